"""Tiny models of many architectures, each number in them random, with batches and outputs to compare.

`MODELS` are those of the matrix in docs/methods.md. A model is built once a process; `fresh` gives identical copies.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from copies import Copies
from device import DEVICE
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCABULARY, WIDTH, BLOCKS, HEADS, INNER, CLASSES = 40, 16, 2, 4, 24, 3
ROWS, LENGTH = 3, 7
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """One model of the zoo. `build` makes it with any values; `inputs` draws a batch from a generator."""

    name: str
    title: str
    build: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[torch.Generator], Batch] = field(repr=False)

    def fresh(self, seed: int = 0) -> nn.Module:
        """A copy in eval mode; the same values for the same seed."""
        copied = _copies(self, seed).fresh()
        return copied if DEVICE.type == "cpu" else copied.to(DEVICE)

    def shapes(self) -> nn.Module:
        """The model on the `meta` device, built there."""
        return _copies(self, None).fresh()

    def state(self, seed: int = 0) -> dict[str, Tensor]:
        """What the state dict of such a copy holds, to compare with."""
        return {name: tensor.to(DEVICE) for name, tensor in _template(self, seed).state_dict().items()}

    def batch(self, seed: int = 1) -> Batch:
        given = self.inputs(torch.Generator().manual_seed(seed))
        return {name: tensor.to(DEVICE) for name, tensor in given.items()}


@functools.cache
def _template(model: Model, seed: int | None) -> nn.Module:
    """The model with values of a seed; without one, on the `meta` device."""
    if seed is None:
        with torch.device("meta"):
            return model.build().eval().to("meta")  # what is written `torch.Tensor(size)` ignores the `with`
    made = model.build().eval()
    randomize(made, seed)
    return made


@functools.cache
def _copies(model: Model, seed: int | None) -> Copies:
    return Copies(_template(model, seed))


def randomize(module: nn.Module, seed: int) -> None:
    """Distinct random values for every parameter and running statistic: zeros and ones hide forgotten tensors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() < 2:
                gain = name.endswith("weight") or "layer_scale" in name
                parameter.copy_(normal(parameter, 0.2) + gain)
            else:
                inputs = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
                parameter.copy_(normal(parameter, max(inputs, 4) ** -0.5))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(normal(buffer, 0.3))
            elif name.endswith("running_var"):
                buffer.copy_(normal(buffer, 0.3).abs() + 0.5)


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch, shortcuts: bool = False) -> Tensor:
    """All that a model gives for a batch in eval mode as one vector, padding left out.

    `shortcuts`: with the fused kernels that `nn.TransformerEncoder` and `nn.MultiheadAttention` take where no
    gradient is wanted; their results differ from the usual ones by rounding. Parameters require no gradient
    meanwhile: even here torch chooses the kernel of a linear map by that.
    """
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(shortcuts)
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        return flat(model.eval()(**batch), batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        for parameter in required:
            parameter.requires_grad_(True)


def flat(output: Any, batch: Batch) -> Tensor:
    """The tensors of an output in one vector. Of states over the text only those that are not padding."""
    parts = []
    for name, value in _tensors(output):
        mask = batch.get("attention_mask", batch.get("mask"))
        if "decoder_input_ids" in batch and not name.startswith("encoder"):
            mask = None
        if mask is not None and value.dim() == 3 and value.shape[1] >= mask.shape[1]:
            value = value[:, value.shape[1] - mask.shape[1] :][mask.bool()]
        parts.append(value.reshape(-1))
    return torch.cat(parts)


def _tensors(output: Any) -> Iterable[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield "output", output
    elif isinstance(output, dict):
        kept = ("logits", "last_hidden_state", "pooler_output", "encoder_last_hidden_state")
        yield from ((name, output[name]) for name in kept if output.get(name) is not None)
    else:
        raise TypeError(f"unknown output {type(output)}")


def _text(generator: torch.Generator) -> Batch:
    """Token ids and mask; each row after the first has more padding on the right than the one before."""
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, ROWS):
        mask[row, -row:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _pair(generator: torch.Generator) -> Batch:
    decoder = torch.randint(3, VOCABULARY, (ROWS, LENGTH - 2), generator=generator)
    return {**_text(generator), "decoder_input_ids": decoder}


def _plain(generator: torch.Generator) -> Batch:
    given = _text(generator)
    return {"tokens": given["input_ids"], "mask": given["attention_mask"]}


def _wave(generator: torch.Generator) -> Batch:
    """Sound whose later rows end earlier."""
    mask = torch.ones(ROWS, 120, dtype=torch.long)
    for row in range(1, ROWS):
        mask[row, -16 * row :] = 0
    return {"input_values": torch.randn(mask.shape, generator=generator) * mask, "attention_mask": mask}


def _random(name: str, *shape: int) -> Callable[[torch.Generator], Batch]:
    return lambda generator: {name: torch.randn(ROWS, *shape, generator=generator)}


def _hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**settings))


class Plain(nn.Module):
    """A user's own encoder: tokens (rows, length) and mask, 1 on real tokens, to logits (rows, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, BLOCKS)
        self.output = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.embedding(tokens) + self.position[: tokens.shape[1]]
        states = self.encoder(states, src_key_padding_mask=mask == 0)
        weights = mask.unsqueeze(-1).to(states.dtype)
        return self.output((states * weights).sum(1) / weights.sum(1))


def _example(name: str, **constants: Any) -> Callable[[], nn.Module]:
    """The model that the function of that name in examples/NAME.py makes, with other values for its constants."""

    def build() -> nn.Module:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # pickled copies find its classes there
        spec.loader.exec_module(module)
        vars(module).update(constants)
        return getattr(module, name)()

    return build


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS,
    "intermediate_size": INNER, "max_position_embeddings": 48, "pad_token_id": 0, "num_labels": CLASSES,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 32, "num_labels": CLASSES}
ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}

MODELS = [
    Model("bert", "BERT", _hf("BertModel", "BertConfig", **SIZES), _text),
    Model("roberta", "RoBERTa", _hf("RobertaForSequenceClassification", "RobertaConfig", **SIZES), _text),
    Model("deberta_v2", "DeBERTa-v2", _hf(
        "DebertaV2Model", "DebertaV2Config", **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
    ), _text),
    Model("modernbert", "ModernBERT", _hf(
        "ModernBertForSequenceClassification", "ModernBertConfig", **SIZES, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2, local_attention=4, layer_types=["full_attention", "sliding_attention"],
    ), _text),
    Model("gpt2", "GPT-2", _hf(
        "GPT2Model", "GPT2Config", vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS,
        n_inner=INNER, n_positions=48, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ), _text),
    Model("llama", "Llama", _hf("LlamaModel", "LlamaConfig", **GROUPED), _text),
    Model("qwen3", "Qwen3", _hf(
        "Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8, tie_word_embeddings=True
    ), _text),
    Model("glm", "GLM", _hf("GlmForSequenceClassification", "GlmConfig", **GROUPED, head_dim=8), _text),
    Model("t5", "T5", _hf(
        "T5Model", "T5Config", vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=INNER, num_layers=BLOCKS,
        num_heads=HEADS, relative_attention_num_buckets=8, relative_attention_max_distance=16,
    ), _pair),
    Model("mixtral", "Mixtral", _hf("MixtralModel", "MixtralConfig", **GROUPED, num_local_experts=3), _text),
    Model("vit", "ViT", _hf(
        "ViTForImageClassification", "ViTConfig", **ENCODER, **IMAGE, patch_size=8
    ), _random("pixel_values", 3, 32, 32)),
    Model("swin", "Swin", _hf(
        "SwinModel", "SwinConfig", **IMAGE, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4],
        window_size=4, mlp_ratio=2.0, drop_path_rate=0.0,
    ), _random("pixel_values", 3, 32, 32)),
    Model("convnext", "ConvNeXt", _hf(
        "ConvNextForImageClassification", "ConvNextConfig", **IMAGE, num_stages=2, hidden_sizes=[8, 16],
        depths=[1, 2], layer_scale_init_value=0.1,
    ), _random("pixel_values", 3, 32, 32)),
    Model("resnet", "ResNet", _hf(
        "ResNetForImageClassification", "ResNetConfig", **IMAGE, embedding_size=8, hidden_sizes=[16, 32],
        depths=[1, 2], layer_type="bottleneck",
    ), _random("pixel_values", 3, 32, 32)),
    Model("wav2vec2", "Wav2Vec2", _hf(
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **ENCODER, num_labels=CLASSES, conv_dim=[8, 8],
        conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        mask_time_length=2, mask_time_prob=0.2, layerdrop=0.0, classifier_proj_size=12,
    ), _wave),
    Model("wavlm", "WavLM", _hf(
        "WavLMForSequenceClassification", "WavLMConfig", **ENCODER, num_labels=CLASSES, conv_dim=[8, 8],
        conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0, layerdrop=0.0, classifier_proj_size=12, num_buckets=8,
    ), _wave),
    Model("ast", "AST", _hf(
        "ASTForAudioClassification", "ASTConfig", **ENCODER, num_labels=CLASSES, patch_size=8, max_length=32,
        num_mel_bins=16, frequency_stride=8, time_stride=8,
    ), _random("input_values", 32, 16)),
    Model("whisper", "Whisper's encoder", lambda: hf.models.whisper.modeling_whisper.WhisperEncoder(
        hf.WhisperConfig(
            d_model=WIDTH, encoder_layers=BLOCKS, encoder_attention_heads=HEADS, encoder_ffn_dim=INNER,
            num_mel_bins=8, max_source_positions=12,
        )
    ), _random("input_features", 8, 24)),
    Model("transformer", "`nn.TransformerEncoder`", Plain, _plain),
    Model("squeezenet", "SqueezeNet", _example("squeezenet", CLASSES=10), _random("x", 3, 31, 31)),
    Model("resnet20", "ResNet-20", _example("resnet20", DEPTH=2), _random("x", 3, 16, 16)),
]  # fmt: skip
BY_NAME = {model.name: model for model in MODELS}
