"""Adapters in every placement against plain implementations written from the papers."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as hf
import zoo
from shaken import count, message, shaken
from torch import Tensor, nn

from graftkit import NotFoldable, attach, detach
from graftkit.engine.audit import Audit
from graftkit.grafts.graft import Graft

pytestmark = pytest.mark.sampled

L, W, INNER = tiny.BLOCKS, tiny.WIDTH, tiny.INNER
FUNCTIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


def added(graft: Graft, place: str, f: str, scale: float = 1.0):
    """x -> s (W2 f(W1 x + b1) + b2) with the values at a place, '' for none there."""
    values = {n: p.detach() for n, p in graft.model.get_submodule(place).adapter_default.named_parameters()}
    down, down_bias, up, up_bias = (values[n] for n in ("down", "down_bias", "up", "up_bias"))
    return lambda x: scale * (FUNCTIONS[f](x @ down.T + down_bias) @ up.T + up_bias)


def none(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def states(length: int = 5, width: int = W, seed: int = 3) -> Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(seed))


# ---- how many


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_parameter_counts(kind):
    def trained(text: str) -> int:
        return count(attach(tiny.bare(kind), text))

    m = 7
    one, norms = 2 * W * m + m + W, {"bert": 4 * W, "gpt2": 4 * W, "llama": 2 * W}[kind]
    assert trained(f"adapter({m})") == L * (2 * one + norms)
    assert trained(f"adapter({m}, norms=False)") == 2 * L * one
    assert trained(f"adapter({m}, sites='blocks[1:]')") == (L - 1) * (2 * one + norms)  # AdapterDrop
    assert trained(f"adapter({m}, sites='attention, blocks[0].ffn', norms=False)") == (L + 1) * one
    assert trained(f"adapter({m}, 'pfeiffer')") == L * one
    assert trained(f"adapter({m}, 'pfeiffer', sites='blocks[-1:]', norms=True)") == one + norms
    assert trained(f"adapter({m}, 'parallel')") == L * one


def test_counts_are_those_that_were_published():
    """Houlsby on MiniLM, 6 blocks of width 384 with a bottleneck of 64, without norms; half of it for Pfeiffer."""
    config = hf.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.device("meta"):
        model = hf.BertModel(config)
    houlsby = attach(model, "adapter(norms=False)", keep_base=False)
    assert count(houlsby) == 595_200
    detach(houlsby)
    assert count(attach(model, "adapter(placement='pfeiffer')", keep_base=False)) == 595_200 // 2


# ---- where


def bert_layer(block, x: Tensor, attention, ffn, beside, behind) -> Tensor:
    """A block of BERT without padding; `attention` and `ffn` stand before the sums, `behind` acts on LN(sum)."""
    part, split = block.attention.self, (*x.shape[:2], tiny.HEADS, W // tiny.HEADS)
    q, k, v = (m(x).view(split).transpose(1, 2) for m in (part.query, part.key, part.value))
    mixed = (q @ k.mT / math.sqrt(split[3])).softmax(-1) @ v
    h = F.linear(mixed.transpose(1, 2).reshape(x.shape), *block.attention.output.dense._parameters.values())
    x = block.attention.output.LayerNorm(x + h + attention(h))
    h = F.linear(F.gelu(block.intermediate.dense(x)), *block.output.dense._parameters.values())
    total = x + h + ffn(h) + beside(x)
    return block.output.LayerNorm(total + behind(block.output.LayerNorm(total)))


@pytest.mark.parametrize(
    "text,f,scale,parts",
    [
        ("adapter(5)", "gelu", 1, ("attention", "ffn")),
        ("adapter(5, sites='ffn', nonlinearity='silu', scale=0.5)", "silu", 0.5, ("ffn",)),
        ("adapter(5, 'pfeiffer')", "relu", 1, ("behind",)),
        ("adapter(5, 'pfeiffer', nonlinearity='tanh', scale=3)", "tanh", 3, ("behind",)),
        ("adapter(5, 'parallel')", "relu", 4, ("beside",)),
    ],
)
def test_placements_on_bert(text, f, scale, parts):
    graft = shaken(tiny.bare("bert"), text)
    block, name = graft.model.encoder.layer[1], "encoder.layer.1"
    places = {
        "attention": f"{name}.attention.output.dropout", "ffn": f"{name}.output.dropout",
        "beside": f"{name}.output.dropout", "behind": name,
    }  # fmt: skip
    given = {part: added(graft, places[part], f, scale) if part in parts else none for part in places}
    x = states()
    with torch.no_grad():
        got = first(block(x))
        trained = {id(p) for p in graft.parameters.values()}
        with_norms = any(id(p) in trained for p in block.output.LayerNorm.parameters())
        for (
            module
        ) in block.modules():  # the reference uses the same norms and maps, without what was added to them
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        wanted = bert_layer(block, x, **given)
    assert tiny.relative(got, wanted) < 1e-6
    assert with_norms == ("(5" in text and "'p" not in text)


@pytest.mark.parametrize("name", ["llama", "glm", "gpt2", "vit", "whisper", "mixtral", "t5", "swin"])
def test_pfeiffer_stands_behind_the_sum_where_no_norm_ends_the_block(name):
    model, given, seen = zoo.BY_NAME[name].fresh(), zoo.BY_NAME[name].batch(), {}
    graft = shaken(model, "adapter(3, 'pfeiffer', sites='blocks[-1:]')")
    place = graft.backbone.blocks[-1]
    change = added(graft, place, "relu")
    model.get_submodule(place).register_forward_hook(lambda m, args, output: seen.update(out=first(output)))
    with torch.no_grad():
        model(**given)
        got = seen["out"]
        with graft.disabled():
            model(**given)
    assert tiny.relative(got, seen["out"] + change(seen["out"])) < 1e-5
    assert tiny.relative(got, seen["out"]) > 1e-3


def torch_layer(block, x: Tensor, attention, ffn, beside, behind) -> Tensor:
    """`nn.TransformerEncoderLayer` with its norms before or behind its parts, written out."""

    def norm(module, s: Tensor) -> Tensor:
        return F.layer_norm(s, (W,), module.weight, module.bias, module.eps)

    def attend(s: Tensor) -> Tensor:
        h = block.self_attn(s, s, s, need_weights=False)[0]
        return h + attention(h)

    def forward(s: Tensor) -> Tensor:
        inner = F.relu(F.linear(s, block.linear1.weight, block.linear1.bias))
        h = F.linear(inner, block.linear2.weight, block.linear2.bias)
        return h + ffn(h) + beside(s)

    if block.norm_first:
        x = x + attend(norm(block.norm1, x))
        x = x + forward(norm(block.norm2, x))
        return x + behind(x)
    x = norm(block.norm1, x + attend(x))
    total = x + forward(x)
    return norm(block.norm2, total + behind(norm(block.norm2, total)))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "text,given",
    [
        ("adapter(3)", {"attention": "dropout1", "ffn": "dropout2"}),
        ("adapter(3, 'parallel', nonlinearity='gelu')", {"beside": "dropout2"}),
        ("adapter(3, 'pfeiffer', nonlinearity='gelu')", {"behind": ""}),
    ],
)
def test_placements_on_the_blocks_of_torch(text, given, norm_first):
    layer = nn.TransformerEncoderLayer(W, 4, INNER, dropout=0.3, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    tiny.randomize(model, 4)
    graft, x = shaken(model, text), states()
    scale = 4 if "beside" in given else 1
    parts = dict.fromkeys(("attention", "ffn", "beside", "behind"), none)
    parts |= {p: added(graft, f"layers.0.{at}".rstrip("."), "gelu", scale) for p, at in given.items()}
    with torch.no_grad():
        assert tiny.relative(model.layers[0](x), torch_layer(model.layers[0], x, **parts)) < 1e-5


def places(graft: Graft) -> list[tuple[str, str]]:
    """(place, name of the addition) of each adapter."""
    return [name.rsplit(".", 1) for name, _ in graft.additions() if "adapter" in name.rsplit(".", 1)[-1]]


SIZES = {k: v for k, v in zoo.SIZES.items() if k != "num_labels"}


@pytest.mark.parametrize("parallel", [True, False])
def test_attention_and_feed_forward_that_share_a_sum(parallel):
    """GPT-NeoX: x + A(attention(LN x)) + A(ffn(LN x)), or one behind the other."""
    config = hf.GPTNeoXConfig(**SIZES, bos_token_id=1, eos_token_id=2, use_parallel_residual=parallel)
    model = hf.GPTNeoXModel(config).eval()
    tiny.randomize(model, 1)
    graft = shaken(model, "adapter(3, norms=False)")
    block = model.layers[0]
    a, b = (
        added(graft, "layers.0.attention.dense", "gelu"),
        added(graft, "layers.0.mlp.dense_4h_to_h", "gelu"),
    )
    seen = {}
    hooks = [
        m.register_forward_hook(lambda m, i, o, n=n: seen.update({n: o}))
        for n, m in (("attention", block.attention.dense), ("ffn", block.mlp.dense_4h_to_h), ("block", block))
    ] + [
        block.register_forward_pre_hook(
            lambda m, i, k: seen.update(x=i[0] if i else k["hidden_states"]), with_kwargs=True
        )
    ]
    with torch.no_grad():
        model(**tiny.batch())
    for hook in hooks:
        hook.remove()
    x, out = seen["x"], first(seen["block"])
    with torch.no_grad(), graft.disabled():
        raw_b = block.mlp(block.post_attention_layernorm(x if parallel else x + seen["attention"]))
        assert tiny.relative(seen["ffn"], raw_b + b(raw_b)) < 1e-5
        assert tiny.relative(out, x + seen["attention"] + seen["ffn"]) < 1e-5
    assert tiny.relative(seen["attention"], seen["attention"] - a(none(x))) > 1e-3  # it did act


PLACES = {
    "t5": ["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"],
    "mixtral": ["self_attn.o_proj", "mlp"],
    "glm": ["self_attn.o_proj", "mlp.down_proj"],
    "vit": ["attention.o_proj", "mlp.fc2"],
    "wav2vec2": ["attention.out_proj", "feed_forward.output_dropout"],
    "whisper": ["self_attn.out_proj", "fc2"],
    "modernbert": ["attn.Wo", "mlp.Wo"],
    "gpt2": ["attn.resid_dropout", "mlp.c_proj"],
    "convnext": ["pwconv2"],
    "resnet": ["layer.2.convolution"],
    "squeezenet": ["expand3x3"],
    "resnet20": ["conv2"],
}


@pytest.mark.parametrize("name", PLACES)
def test_places_in_the_last_block(name):
    graft = attach(zoo.BY_NAME[name].fresh(), "adapter(3)")
    block = graft.backbone.blocks[-1]
    assert [p[len(block) + 1 :] for p, _ in places(graft) if p.startswith(f"{block}.")] == PLACES[name]


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_a_layer_that_is_shared_trains(placement):
    """ALBERT calls one layer many times; and it has a dropout that it never calls."""
    torch.manual_seed(0)
    model = hf.AlbertModel(hf.AlbertConfig(**SIZES, embedding_size=8, num_hidden_groups=1))
    graft = attach(model, f"adapter(3, {placement!r})")
    audit = Audit(model, graft.labels)
    optimizer = torch.optim.AdamW(graft.param_groups(lr=1e-2))
    for seed in range(2):
        model(**tiny.batch(seed=seed)).last_hidden_state.square().sum().backward()
        audit.after_backward()
        optimizer.step()
        audit.after_step()
    assert audit.done


def test_a_convolution_is_adapted_over_its_channels():
    model = zoo.BY_NAME["resnet20"].fresh()
    graft = shaken(model, "adapter(3, norms=False)")
    block = model.layer2[1]
    values = {n: p.detach() for n, p in block.conv2.adapter_default.named_parameters()}
    x = torch.randn(2, 32, 6, 5)
    with torch.no_grad():
        with graft.disabled():
            h = block.conv2(x)
        low = F.gelu(F.conv2d(h, values["down"][:, :, None, None], values["down_bias"]))
        wanted = h + F.conv2d(low, values["up"][:, :, None, None], values["up_bias"])
        assert tiny.relative(block.conv2(x), wanted) < 1e-5


def test_a_second_graft_goes_on_from_the_first():
    """Behind a norm that ends the block an untrained second graft changes nothing, and both add to one sum."""
    text, x = "adapter(3, 'pfeiffer')", states()
    model = tiny.bare("bert")
    one = shaken(model, text, name="one")
    block = model.encoder.layer[0]
    with torch.no_grad():
        alone = first(block(x))
        two = attach(model, text, name="two")
        assert torch.equal(first(block(x)), alone)
        tiny.randomize(block.adapter_two, 7)
        with one.disabled(), two.disabled():
            h = {}
            hook = block.output.LayerNorm.register_forward_hook(lambda m, a, o: h.update(sum=a[0]))
            block(x)
            hook.remove()
        norm = block.output.LayerNorm.forward
        total = h["sum"] + block.adapter_one.change(norm(h["sum"]))
        wanted = norm(total + block.adapter_two.change(norm(total)))
        assert tiny.relative(first(block(x)), wanted) < 1e-6


def test_dropout_of_what_is_added():
    graft = shaken(tiny.bare("bert"), "adapter(3, 'pfeiffer', dropout=0.5)")
    bottleneck, x = graft.model.encoder.layer[0].adapter_default, states()
    whole = bottleneck.change(x)
    bottleneck.train()
    part = bottleneck.change(x)
    assert ((part == 0) | torch.isclose(part, 2 * whole)).all() and 0.3 < (part == 0).float().mean() < 0.7


def test_what_adapters_refuse():
    assert "SqueezeNet" in message(zoo.BY_NAME["squeezenet"].fresh(), "adapter(placement='parallel')")
    text = message(tiny.bare("bert"), "adapter(placement='pfeiffer', sites='attention')")
    assert "'attention'" in text and "houlsby" in text and "lora()" in text
    chunked = tiny.bare("bert", chunk_size_feed_forward=2)
    assert "chunk_size_feed_forward=2" in message(chunked, "adapter(placement='pfeiffer')")
    assert "no such blocks" in message(nn.Sequential(nn.Linear(3, 3)), "adapter()")
    assert "outputs of attention or feed-forward" in message(tiny.bare("bert"), "adapter(sites='q')")
    assert "houlsby" in message(tiny.bare("bert"), "adapter(placement='houlsbi')")
    with pytest.raises(NotFoldable, match=r"adapter\(\) cannot be folded"):
        attach(tiny.bare("bert"), "adapter(placement='parallel')").fold()
