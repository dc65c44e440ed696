"""Tiny random models whose every parameter has its own random value, and batches with padding."""

from __future__ import annotations

from typing import Any

import torch
from copies import Copies
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
)

VOCABULARY, WIDTH, BLOCKS, HEADS, KV_HEADS, INNER, CLASSES = 40, 16, 3, 4, 2, 24, 3
KINDS = ("bert", "gpt2", "llama")
BARE: dict[str, type[PreTrainedModel]] = {"bert": BertModel, "gpt2": GPT2Model, "llama": LlamaModel}
WITH_HEAD: dict[str, type[PreTrainedModel]] = {
    "bert": BertForSequenceClassification,
    "gpt2": GPT2ForSequenceClassification,
    "llama": LlamaForSequenceClassification,
}
CAUSAL: dict[str, type[PreTrainedModel]] = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}


def config(kind: str, **changes: Any) -> Any:
    common = {"vocab_size": VOCABULARY, "num_labels": CLASSES, "pad_token_id": 0} | changes
    if kind == "bert":
        return BertConfig(
            hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, intermediate_size=INNER,
            max_position_embeddings=48, **common,
        )  # fmt: skip
    if kind == "gpt2":
        return GPT2Config(
            n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_inner=INNER, n_positions=48,
            bos_token_id=1, eos_token_id=2, **common,
        )  # fmt: skip
    return LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        intermediate_size=INNER, max_position_embeddings=48, bos_token_id=1, eos_token_id=2, **common,
    )  # fmt: skip


def randomize(module: nn.Module, seed: int, std: float = 0.2) -> None:
    """Distinct random values for every parameter: zeros and ones hide transposed or forgotten tensors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.is_meta:
                center = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
                values = torch.randn(parameter.shape, generator=generator) * std
                parameter.copy_(values + center * name.endswith("weight"))


_made: dict[str, Copies] = {}


def make(model_class: type[PreTrainedModel], kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A copy of a model that is built once a process; the global random state stays as it is."""
    key = repr((model_class, kind, seed, changes, torch.get_default_device()))
    if key not in _made:
        with torch.random.fork_rng(devices=[]):
            model = model_class(config(kind, **changes))
        randomize(model, seed)
        _made[key] = Copies(model.eval())
    return _made[key].fresh()


def bare(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return make(BARE[kind], kind, seed, **changes)


def with_head(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return make(WITH_HEAD[kind], kind, seed, **changes)


def causal(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return make(CAUSAL[kind], kind, seed, **changes)


def batch(rows: int = 4, length: int = 7, seed: int = 1, side: str = "right") -> dict[str, Tensor]:
    """Token ids and mask; each row after the first has more padding than the one before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        gap = min(row, length - 1)
        if gap:
            mask[row, -gap:] = 0
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def outputs(model: nn.Module, given: dict[str, Tensor] | None = None) -> Tensor:
    """All that a model gives for a batch, in eval mode, as one vector; padded positions are left out."""
    model.eval()
    given = given or batch()
    with torch.no_grad():
        return flat(model(**given), given["attention_mask"])


def flat(output: Any, mask: Tensor) -> Tensor:
    parts = []
    for name in ("logits", "last_hidden_state", "pooler_output"):
        value = getattr(output, name, None)
        if value is not None:
            whole = value.dim() == 3
            parts.append((value[mask.bool()] if whole else value).reshape(-1))
    return torch.cat(parts)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer, buffers that are not saved among them."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def relative(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())
