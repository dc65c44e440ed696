"""lora() against its formulas on every kind of weight: ranks, scales, rates, biases, what it refuses, what it leaves alone."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from custom_models import MODELS, Conv, given, grafted, make
from shaken import ALL_KINDS, count, message, shaken
from torch import Tensor, nn
from torch.nn import functional as F

from graftkit import NotFoldable, UserError, attach, detach, load

pytestmark = pytest.mark.sampled

W, L, INNER, V = tiny.WIDTH, tiny.BLOCKS, tiny.INNER, tiny.VOCABULARY


def factors(graft, part: str = "") -> list[Tensor]:
    return [p.detach() for name, p in graft.parameters.items() if part in name]


# ---- linear maps


def test_it_is_the_formula():
    model = tiny.bare("bert")
    graft = shaken(model, "lora(rank=3, alpha=5, sites='re:encoder.layer.1.intermediate.dense')")
    site = model.encoder.layer[1].intermediate.dense
    x = torch.randn(2, 4, W)
    A, B = graft.parameters.values()
    torch.testing.assert_close(site(x), x @ site.weight.T + site.bias + 5 / 3 * (x @ A.T @ B.T))
    torch.testing.assert_close(site(input=x), site(x))  # by name
    torch.testing.assert_close(site(x[0, 0]), site(x)[0, 0])  # without a batch
    assert site(x[:0]).shape == (0, 4, INNER)


def test_a_transposed_map():
    model = tiny.bare("gpt2")
    graft = shaken(model, "lora(rank=3, sites='blocks[0].up')")
    site = model.h[0].mlp.c_fc
    x = torch.randn(2, 4, W)
    A, B = graft.parameters.values()
    assert A.shape == (3, W) and B.shape == (INNER, 3)
    torch.testing.assert_close(site(x), x @ site.weight + site.bias + 2 * (x @ A.T @ B.T))


def test_dropout_acts_on_the_input_of_a_in_training_only():
    model = tiny.bare("bert")
    graft = shaken(model, "lora(rank=3, dropout=0.5, sites='blocks[0].up')")
    site = model.encoder.layer[0].intermediate.dense
    A, B = graft.parameters.values()
    x = torch.randn(4, W)
    site.train()
    torch.manual_seed(3)
    got = site(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(got, F.linear(x, site.weight, site.bias) + 2 * (dropped @ A.T @ B.T))
    site.eval()
    torch.testing.assert_close(site(x), F.linear(x, site.weight, site.bias) + 2 * (x @ A.T @ B.T))


def test_types_that_differ():
    """A half precision base without autocast, and a base in full precision within it."""
    site = nn.Linear(W, INNER)
    model = nn.Sequential(site, nn.Linear(INNER, 2))
    graft = shaken(model, "lora(rank=3, sites='re:0')")
    A, B = factors(graft)
    x = torch.randn(5, W)
    with torch.autocast("cpu", torch.bfloat16):
        assert site(x).dtype == torch.bfloat16
        torch.testing.assert_close(site(x).float(), site.eval()(x).float())
    site.bfloat16()
    for parameter, value in zip(graft.parameters.values(), (A, B)):
        parameter.data = value.clone()
    got = site(x.bfloat16())
    wanted = F.linear(x.bfloat16(), site.weight, site.bias).float() + 2 * (x.bfloat16().float() @ A.T @ B.T)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)


def test_rank_may_exceed_the_width():
    graft = shaken(tiny.bare("llama"), f"lora(rank={3 * W})")
    wanted = tiny.outputs(graft.model)
    graft.fold()
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5


# ---- ranks, scales, rates


def test_scales():
    def scales(text: str) -> set[float]:
        graft = attach(tiny.bare("llama"), text)
        return {module.scale for _, module in graft.additions()}

    assert scales("lora(rank=5)") == {2.0}
    assert scales("lora(rank=5, alpha=3)") == {3 / 5}
    assert scales("lora(rank=5, alpha=3, use_rslora=True)") == {3 / math.sqrt(5)}
    assert scales("lora(rank=4, use_rslora=True)") == {16 / 2}
    assert scales("lora(rank=4, alpha=3, rank_pattern={'q': 2})") == {3 / 4, 3 / 2}
    assert scales("lora(rank=4, alpha_pattern={'q': 3, 'blocks[0]': 5})") == {2.0, 3 / 4, 5 / 4}


def test_ranks_by_selection():
    graft = attach(
        tiny.bare("llama"), "lora(rank=3, rank_pattern={'blocks[-2:]': 5, 'q': 7, 'blocks[0].q': 2})"
    )
    for name, module in graft.additions():
        block = int(name.split(".")[1])
        wanted = (2 if block == 0 else 7) if "q_proj" in name else (3 if block == 0 else 5)
        assert module.A.shape[0] == module.B.shape[1] == wanted, name
    wanted = tiny.outputs(graft.model)
    assert torch.equal(wanted, tiny.outputs(tiny.bare("llama")))


@pytest.mark.parametrize(
    "text,said",
    [
        (
            "lora(rank_pattern={'q': 0})",
            r"lora\(\): rank_pattern has 'q': 0; write a selection and a positive",
        ),
        ("lora(rank_pattern={'q': 2.5})", "rank_pattern has 'q': 2.5"),
        ("lora(rank_pattern={'q': True})", "rank_pattern has 'q': True"),
        ("lora(rank_pattern={3: 2})", "rank_pattern has 3: 2"),
        ("lora(alpha_pattern={'q': 0})", "alpha_pattern has 'q': 0"),
        ("lora(alpha_pattern={'q': -1.0})", "alpha_pattern has 'q': -1.0"),
        ("lora(rank_pattern={'head': 2})", "matches nothing"),
        (
            "lora(sites='q', rank_pattern={'v': 2})",
            "rank_pattern has 'v', which is not among sites='q'; widen",
        ),
        ("lora(bias='some')", "bias is 'some', but must be one of"),
    ],
)
def test_ranks_that_cannot_be(text, said):
    with pytest.raises(UserError, match=said):
        attach(tiny.bare("llama"), text)


def test_the_rate_of_b():
    graft = attach(tiny.bare("bert"), "lora(rank=2, loraplus_lr_ratio=8, lr=0.01)")
    assert {group.lr_scale for name, group in graft.labels.items() if name.endswith(".A")} == {1.0}
    assert {group.lr_scale for name, group in graft.labels.items() if name.endswith(".B")} == {8.0}
    assert sorted({group["lr"] for group in graft.param_groups()}) == pytest.approx([0.01, 0.08])


def test_starts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4000, 8), nn.Linear(8, 2))
    attach(model, "lora(rank=5, sites='re:0')", name="kaiming")
    attach(model, "lora(rank=5, sites='re:0', init='gaussian')", name="gaussian")
    uniform, normal = model[0].lora_kaiming.A.detach(), model[0].lora_gaussian.A.detach()
    assert uniform.abs().max() <= 1 / math.sqrt(4000) < 1.01 * uniform.abs().max()
    assert normal.std() == pytest.approx(1 / 5, rel=0.03)
    assert not model[0].lora_kaiming.B.any() and not model[0].lora_gaussian.B.any()


# ---- biases


@ALL_KINDS
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases(kind, bias):
    plain = tiny.bare(kind)
    graft = attach(tiny.bare(kind), f"lora(rank=2, sites='attention', bias='{bias}')")
    biases = {name for name, group in graft.labels.items() if group.role == "base"}
    every = {name for name, _ in plain.named_parameters() if name.endswith("bias")}
    maps = {"bert": ("query", "key", "value", "output.dense"), "gpt2": ("c_attn", "attn.c_proj"), "llama": ()}
    some = {n for n in every if any(f"{m}.bias" in n for m in maps[kind]) and ".att" in n}
    assert biases == (every if bias == "all" else some)


def test_biases_are_given_back():
    model = tiny.with_head("bert")
    wanted, before = tiny.outputs(model), tiny.snapshot(model)
    graft = shaken(model, "lora(rank=2, bias='all') + head(classes=3, pooling='own')")
    assert graft.labels["classifier.bias"].role == "head"
    assert graft.labels["bert.pooler.dense.bias"].method == "lora"
    changed = tiny.outputs(model)
    with graft.disabled():
        assert torch.equal(tiny.outputs(model), wanted)
    graft.fold()
    assert tiny.relative(tiny.outputs(model), changed) < 1e-5
    graft.unfold()
    assert torch.equal(tiny.outputs(model), changed)
    detach(graft)
    assert all(torch.equal(value, before[name]) for name, value in tiny.snapshot(model).items())


def test_a_bias_beside_b(tmp_path):
    graft = grafted("Conv2d", "lora(rank=2, sites='conv2d, lin0', lora_bias=True, alpha=3)")
    assert count(graft) == 2 * (6 * 9 + 8) + 8 + 2 * (8 + 3) + 3
    x = given("Conv2d")
    wanted = graft.model(x)
    linear = graft.model.lin0
    A, B, b = factors(graft, "lin0")
    h = torch.randn(4, 8)
    torch.testing.assert_close(linear(h), F.linear(h, linear.weight, linear.bias) + 1.5 * (h @ A.T @ B.T + b))
    graft.fold()
    assert tiny.relative(graft.model(x), wanted) < 1e-5
    graft.unfold()
    graft.save(tmp_path)
    assert torch.equal(load(make("Conv2d"), tmp_path).model(x), wanted)
    bare = grafted("Conv2d without bias", "lora(rank=2, sites='conv2d', lora_bias=True)")
    with pytest.raises(NotFoldable, match=r"lora\(lora_bias=True\).*conv2d.weight.*no bias"):
        bare.fold()
    assert "lora_bias" in message(make("EmbConv1D"), "lora(sites='emb', lora_bias=True)")


# ---- convolutions


CONVOLUTIONS = [name for name in MODELS if name.startswith("Conv")]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    """A takes on the geometry of the site, B mixes channels within its groups."""
    graft = grafted(name, f"lora(rank=8, alpha=5, sites='{make(name).name}')")
    site, plain = (model.get_submodule(model.name) for model in (graft.model, make(name)))
    A, B = factors(graft)
    dimensions = site.weight.dim() - 2
    assert A.shape == (8, site.in_channels, *site.kernel_size)
    assert B.shape == (8, 8 // site.groups, *[1] * dimensions)
    assert count(graft) == 8 * (site.in_channels * math.prod(site.kernel_size) + 8 // site.groups)
    x = given(name)
    inner = copy.deepcopy(plain)
    inner.groups, inner.bias = 1, None
    inner.weight = nn.Parameter(A)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    wanted = plain(x) + 5 / 8 * convolve(inner(x), B, groups=site.groups)
    torch.testing.assert_close(site(x), wanted)
    torch.testing.assert_close(site(x[0]), wanted[0])  # without a batch
    if site.groups == 1:
        whole = graft.model(x)
        graft.fold()
        assert tiny.relative(graft.model(x), whole) < 1e-5
    else:
        with pytest.raises(NotFoldable, match=r"lora\(\).*with groups.*Keep the graft folder"):
            graft.fold()


@pytest.mark.parametrize("name", ["Conv2d dilated", "Conv2d circular"])
def test_plain_convolutions_are_as_pefts(name):
    graft = grafted(name, "lora(rank=2, sites='conv2d', peft_conv=True)")
    site, plain = graft.model.conv2d, make(name).conv2d
    A, B = factors(graft)
    x = given(name)
    inner = F.conv2d(x, A, padding=site.padding)
    torch.testing.assert_close(site(x), plain(x) + 2 * F.conv2d(inner, B))
    with pytest.raises(NotFoldable, match="peft_conv"):
        graft.fold()


def test_groups_that_do_not_divide_the_rank():
    model = nn.Sequential(
        Conv(1, groups=2).conv1d, nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 4, 1), nn.Linear(4, 2)
    )
    said = message(model, "lora(rank=4, sites='re:1')")
    assert "lora(rank=4)" in said and "Conv1d" in said and "unfreeze()" in said and "groups" in said
    graft = attach(model, "lora(rank=4)")  # by a broad word: what it can, it updates
    assert {name.split(".")[0] for name in graft.labels} == {"0", "2"}
    detach(graft)
    assert "multiple of the 8 groups of this Conv1d" in message(
        model, "lora(rank=4, rank_pattern={'re:0': 8})"
    )
    assert len(attach(model, "lora(rank=4, rank_pattern={'re:1': 8})").parameters) == 6


# ---- embeddings and heads


def test_an_embedding(tmp_path):
    graft = grafted("EmbConv1D with padding", "lora(rank=3, sites='emb')")
    A, B = factors(graft)
    assert A.shape == (3, 50) and B.shape == (5, 3)
    ids = given("EmbConv1D with padding")
    site = graft.model.emb
    torch.testing.assert_close(site(ids), F.embedding(ids, site.weight + 2 * (B @ A).T))
    graft.model(ids).square().sum().backward()
    used = graft.parameters["emb.lora_default.A"].grad.abs().sum(0).nonzero().flatten()
    assert set(used.tolist()) == set(ids.flatten().tolist()) - {7}  # the padding has no gradient
    wanted = graft.model(ids)
    graft.fold()
    assert tiny.relative(graft.model(ids), wanted) < 1e-5


def test_an_embedding_starts_with_a_at_zero():
    graft = attach(make("EmbConv1D"), "lora(rank=3, sites='emb')")
    A, B = factors(graft)
    assert not A.any() and B.std() > 0.5
    assert torch.equal(graft.model(given("EmbConv1D")), make("EmbConv1D")(given("EmbConv1D")))


def test_an_embedding_that_scales():
    graft = grafted("ScaledEmbedding", "lora(rank=3, sites='emb')")
    A, B = factors(graft)
    ids, site = given("ScaledEmbedding"), graft.model.emb
    torch.testing.assert_close(site(ids), 2.5 * F.embedding(ids, site.weight + 2 * (B @ A).T))


def test_a_tied_weight_is_not_folded():
    graft = shaken(tiny.causal("llama", tie_word_embeddings=True), "lora(sites='lm_head')")
    before = tiny.snapshot(graft.model)
    with pytest.raises(UserError, match=r"tied.*leave them out") as caught:
        graft.fold()
    assert "lm_head.weight" in str(caught.value) and "embed_tokens.weight" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in tiny.snapshot(graft.model).items())


def test_the_other_end_of_a_tied_weight_is_left_alone():
    model = tiny.causal("llama", tie_word_embeddings=True)
    head = model.lm_head(torch.ones(1, W))
    shaken(model, "lora(sites='embed_tokens')")
    assert torch.equal(model.lm_head(torch.ones(1, W)), head)


def test_what_all_linear_means_is_unchanged():
    graft = attach(tiny.causal("llama"), "lora(rank=2)")
    assert not any("embed" in name or "lm_head" in name for name in graft.labels)
    assert len(graft.labels) == 2 * 7 * L
