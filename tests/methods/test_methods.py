"""Low-rank updates and adapters against formulas and plain implementations; parameter counts of all methods."""

from __future__ import annotations

import math

import tiny
import torch
from shaken import ALL_KINDS, count, shaken
from torch import Tensor
from torch.nn import functional as F
from transformers import BertModel

from graftkit import attach

W, L, INNER, V = tiny.WIDTH, tiny.BLOCKS, tiny.INNER, tiny.VOCABULARY
KV = {"bert": W, "gpt2": W, "llama": tiny.KV_HEADS * W // tiny.HEADS}
MAPS = {  # (in, out) of each linear map of a block
    "bert": [(W, W)] * 4 + [(W, INNER), (INNER, W)],
    "gpt2": [(W, 3 * W), (W, W), (W, INNER), (INNER, W)],
    "llama": [(W, W), (W, KV["llama"]), (W, KV["llama"]), (W, W), (W, INNER), (W, INNER), (INNER, W)],
}
NORMS = {"bert": 2 * 2 * W, "gpt2": 2 * 2 * W, "llama": 2 * W}  # parameters of the norms of a block
EMBEDDINGS = {"bert": (V + 48 + 2) * W + 2 * W, "gpt2": (V + 48) * W, "llama": V * W}


# ---- parameter counts, as the docstrings give them


@ALL_KINDS
def test_parameter_counts(kind):
    def trained(text: str) -> int:
        return count(attach(tiny.bare(kind), text))

    rank, bottleneck, tokens, hidden = 5, 7, 3, 11
    assert trained(f"lora(rank={rank})") == L * sum(rank * (i + o) for i, o in MAPS[kind])
    assert (
        trained(f"adapter(bottleneck={bottleneck})")
        == 2 * L * (2 * W * bottleneck + bottleneck + W) + L * NORMS[kind]
    )
    assert trained(f"prefix(tokens={tokens})") == 2 * L * tokens * KV[kind]
    assert (
        trained(f"prefix(tokens={tokens}, hidden={hidden})")
        == tokens * W + hidden * (W + 1) + (hidden + 1) * 2 * L * KV[kind]
    )
    assert trained("head(classes=4, pooling='mean')") == 4 * (W + 1)
    assert trained(f"head(classes=4, pooling='mean', hidden={hidden})") == 4 * (hidden + 1) + hidden * (W + 1)
    biases = 0 if kind == "llama" else sum(o for _, o in MAPS[kind]) + NORMS[kind] // 2
    block = sum(i * o for i, o in MAPS[kind]) + biases + (NORMS[kind] // 2 if biases else NORMS[kind])
    assert trained("unfreeze('blocks[-2:]')") == 2 * block
    outside = {"bert": W * W + W, "gpt2": 2 * W, "llama": W}[kind]
    assert trained("full()") == L * block + EMBEDDINGS[kind] + outside
    assert trained("full() + freeze('embeddings, norms')") == trained("full()") - trained(
        "unfreeze('embeddings, norms')"
    )
    if biases:
        assert trained("bitfit()") == L * biases


# ---- adapters


def bert_with_adapters(model: BertModel, added: list[tuple[Tensor, ...]], given: dict[str, Tensor]) -> Tensor:
    """Last hidden states of BERT with Houlsby adapters, written out; `added` holds two bottlenecks a block."""
    mask = torch.where(given["attention_mask"].bool(), 0.0, -1e30)[:, None, None, :]
    x = model.embeddings(given["input_ids"])
    rows, length, width = x.shape
    split = (rows, length, tiny.HEADS, width // tiny.HEADS)

    def bottleneck(y: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        down, down_bias, up, up_bias = parts
        return y + F.gelu(y @ down.T + down_bias) @ up.T + up_bias

    for index, block in enumerate(model.encoder.layer):
        attention, output = block.attention.self, block.attention.output
        q, k, v = (
            m(x).view(split).transpose(1, 2) for m in (attention.query, attention.key, attention.value)
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(split[3]) + mask).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(x.shape)
        y = F.linear(mixed, output.dense.weight, output.dense.bias)
        x = output.LayerNorm(x + bottleneck(y, added[2 * index]))
        inner = F.gelu(block.intermediate.dense(x))
        y = F.linear(inner, block.output.dense.weight, block.output.dense.bias)
        x = block.output.LayerNorm(x + bottleneck(y, added[2 * index + 1]))
    return x


def test_adapter_is_houlsby_on_bert():
    graft = shaken(tiny.bare("bert"), "adapter(bottleneck=5)")
    parameters = graft.parameters
    parts = {}
    for name in parameters:
        site, _, leaf = name.rpartition(".")
        if site.endswith("adapter_default"):
            parts.setdefault(site, {})[leaf] = parameters[name]
    names = ("down", "down_bias", "up", "up_bias")
    added = [tuple(part[name] for name in names) for part in parts.values()]
    assert len(added) == 2 * L
    given = tiny.batch()
    with torch.no_grad():
        got = graft.model(**given).last_hidden_state
        wanted = bert_with_adapters(graft.model, added, given)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real])


def test_adapter_stands_behind_the_dropout():
    model = tiny.bare("bert")
    attach(model, "adapter()")
    block = model.encoder.layer[0]
    assert hasattr(block.attention.output.dropout, "adapter_default")
    assert hasattr(block.output.dropout, "adapter_default")
    assert not hasattr(block.attention.self.dropout, "adapter_default")
    model = tiny.bare("gpt2")
    attach(model, "adapter()")
    assert hasattr(model.h[0].attn.resid_dropout, "adapter_default")
    assert not hasattr(model.h[0].attn.attn_dropout, "adapter_default")
    model = tiny.bare("llama")
    attach(model, "adapter()")
    assert hasattr(model.layers[0].self_attn.o_proj, "adapter_default")
    assert hasattr(model.layers[0].mlp.down_proj, "adapter_default")
