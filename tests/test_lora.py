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
from torch.utils.checkpoint import checkpoint

from graftkit import NotFoldable, UserError, attach, detach, load
from graftkit.methods.low_rank import LowRank

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
    assert scales("lora(rank=5, alpha=3, stabilised=True)") == {3 / math.sqrt(5)}
    assert scales("lora(rank=4, stabilised=True)") == {16 / 2}
    assert scales("lora(rank=4, alpha=3, ranks={'q': 2})") == {3 / 4, 3 / 2}
    assert scales("lora(rank=4, alphas={'q': 3, 'blocks[0]': 5})") == {2.0, 3 / 4, 5 / 4}


def test_ranks_by_selection():
    graft = attach(tiny.bare("llama"), "lora(rank=3, ranks={'blocks[-2:]': 5, 'q': 7, 'blocks[0].q': 2})")
    for name, module in graft.additions():
        block = int(name.split(".")[1])
        wanted = (2 if block == 0 else 7) if "q_proj" in name else (3 if block == 0 else 5)
        assert module.A.shape[0] == module.B.shape[1] == wanted, name
    wanted = tiny.outputs(graft.model)
    assert torch.equal(wanted, tiny.outputs(tiny.bare("llama")))


@pytest.mark.parametrize(
    "text,said",
    [
        ("lora(ranks={'q': 0})", r"lora\(\): ranks has 'q': 0; write a selection and a positive"),
        ("lora(ranks={'q': 2.5})", "ranks has 'q': 2.5"),
        ("lora(ranks={'q': True})", "ranks has 'q': True"),
        ("lora(ranks={3: 2})", "ranks has 3: 2"),
        ("lora(alphas={'q': 0})", "alphas has 'q': 0"),
        ("lora(alphas={'q': -1.0})", "alphas has 'q': -1.0"),
        ("lora(ranks={'head': 2})", "matches nothing"),
        ("lora(sites='q', ranks={'v': 2})", "ranks has 'v', which is none of sites='q'; widen"),
        ("lora(bias='some')", "bias is 'some', but must be one of"),
    ],
)
def test_ranks_that_cannot_be(text, said):
    with pytest.raises(UserError, match=said):
        attach(tiny.bare("llama"), text)


def test_the_rate_of_b():
    graft = attach(tiny.bare("bert"), "lora(rank=2, b_rate=8, lr=0.01)")
    assert {group.lr_scale for name, group in graft.labels.items() if name.endswith(".A")} == {1.0}
    assert {group.lr_scale for name, group in graft.labels.items() if name.endswith(".B")} == {8.0}
    assert sorted({group["lr"] for group in graft.param_groups()}) == pytest.approx([0.01, 0.08])


def test_starts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4000, 8), nn.Linear(8, 2))
    attach(model, "lora(rank=5, sites='re:0')", name="kaiming")
    attach(model, "lora(rank=5, sites='re:0', start='gaussian')", name="gaussian")
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
    graft = grafted("Conv2d", "lora(rank=2, sites='conv2d, lin0', b_bias=True, alpha=3)")
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
    bare = grafted("Conv2d without bias", "lora(rank=2, sites='conv2d', b_bias=True)")
    with pytest.raises(NotFoldable, match=r"lora\(b_bias=True\).*conv2d.weight.*no bias"):
        bare.fold()
    assert "b_bias" in message(make("EmbConv1D"), "lora(sites='emb', b_bias=True)")


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
    graft = grafted(name, "lora(rank=2, sites='conv2d', plain_conv=True)")
    site, plain = graft.model.conv2d, make(name).conv2d
    A, B = factors(graft)
    x = given(name)
    inner = F.conv2d(x, A, padding=site.padding)
    torch.testing.assert_close(site(x), plain(x) + 2 * F.conv2d(inner, B))
    with pytest.raises(NotFoldable, match="plain_conv"):
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
    assert "multiple of the 8 groups of this Conv1d" in message(model, "lora(rank=4, ranks={'re:0': 8})")
    assert len(attach(model, "lora(rank=4, ranks={'re:1': 8})").parameters) == 6


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


# ---- weights that are used without a module of their own


def attention(name: str = "mha", **more) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=True, **more)
    tiny.randomize(layer, 3)
    return nn.ModuleDict({name: layer, "head": nn.Linear(12, 2)})


@pytest.mark.parametrize("more", [{}, {"bias": False}, {"kdim": 7, "vdim": 9}, {"add_bias_kv": True}])
def test_packed_attention(more):
    model = attention(**more).eval()
    text = "lora(rank=2, alpha=3, sites='mha')"
    assert torch.equal(
        run(attach(model, text, name="first").model, more), run(attention(**more).eval(), more)
    )
    detach(model.graftkit_grafts["first"])
    graft = shaken(model, text)
    weights = ["in_proj_weight"] if "kdim" not in more else [f"{n}_proj_weight" for n in "qkv"]
    assert {n.split(".")[1] for n in graft.labels} == {f"lora_{n}_default" for n in [*weights, "out_proj"]}
    plain = attention(**more).eval()
    with torch.no_grad():
        for weight in [*weights, "out_proj.weight"]:
            added = f"lora_{weight.removesuffix('.weight')}_default"
            A, B = factors(graft, f"{added}.")
            plain.mha.get_parameter(weight).add_(1.5 * B @ A)
    got = run(model, more)
    torch.testing.assert_close(got, run(plain, more))
    with torch.no_grad():  # the quick path of torch
        torch.testing.assert_close(run(model, more), got)
    graft.fold()
    torch.testing.assert_close(run(model, more), got)


def run(model: nn.Module, more: dict) -> Tensor:
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    key = x[..., : more.get("kdim", 12)]
    return model["mha"](x, key, key if "vdim" not in more else x[..., : more["vdim"]])[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    tiny.randomize(model, 3)
    return model.eval()


X = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))
PADDING = torch.arange(5) >= torch.tensor([[5], [4], [2]])
WHERE = ["lora(rank=3)", "dora(rank=3)", "pissa(rank=3)"]


@pytest.mark.parametrize("text", WHERE)
def test_the_quick_path_of_an_encoder_sees_the_update(text):
    """Without gradients torch passes layers as one, and packs rows of different lengths."""
    graft = shaken(encoder(), text)
    assert len(graft.labels) == 2 * 4 * (3 if text.startswith("dora") else 2)
    whole = graft.model(X, src_key_padding_mask=PADDING)
    base = encoder()(X, src_key_padding_mask=PADDING)
    with torch.no_grad():
        quick = graft.model(X, src_key_padding_mask=PADDING)
    assert tiny.relative(quick[~PADDING], whole[~PADDING]) < 1e-5
    assert tiny.relative(base[~PADDING], whole[~PADDING]) > 1e-2
    graft.fold()
    assert tiny.relative(graft.model(X, src_key_padding_mask=PADDING)[~PADDING], whole[~PADDING]) < 1e-5


@pytest.mark.parametrize("text", WHERE)
def test_an_error_in_a_call_leaves_nothing_behind(text):
    graft = shaken(encoder(), text)
    wanted = graft.model(X)
    with pytest.raises((RuntimeError, AssertionError)):
        graft.model.layers[0].self_attn(X, X[:, :, :5], X)
    assert not any("weight" in key for module in graft.model.modules() for key in vars(module))
    assert torch.equal(graft.model(X), wanted)
    graft.disable()
    assert tiny.relative(graft.model(X), encoder()(X)) < 1e-6


@pytest.mark.parametrize("text", WHERE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing(text, reentrant):
    def gradients(run) -> list[Tensor]:
        torch.manual_seed(0)
        graft = shaken(encoder().train(), text)
        x = X.clone().requires_grad_()
        for layer in graft.model.layers:
            x = run(layer, x)
        x.square().sum().backward()
        return [p.grad for p in graft.parameters.values()]

    wanted = gradients(lambda layer, x: layer(x))
    got = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    for one, other in zip(got, wanted):
        assert other.any()
        torch.testing.assert_close(one, other)


def test_two_grafts_on_one_packed_weight():
    model = encoder()
    first = shaken(model, "lora(rank=2)", name="first")
    alone = model(X)
    second = shaken(model, "lora(rank=3, alpha=2)", name="second", seed=6)
    both = model(X)
    plain = encoder()
    with torch.no_grad():
        for graft in (first, second):
            for name, update in graft.additions():
                if not isinstance(update, LowRank):
                    continue
                owner = name.rpartition(".")[0]
                weight = plain.get_parameter(f"{owner}.{update.parameter}")
                weight.add_(update.scale * update.B @ update.A)
    torch.testing.assert_close(both, plain(X))
    second.disable()
    torch.testing.assert_close(model(X), alone)
    second.enable()
    first.disable()
    assert tiny.relative(model(X), both) > 1e-2
    first.enable()
    assert torch.equal(model(X), both)
    detach(first)
    detach(second)
    assert tiny.relative(model(X), encoder()(X)) < 1e-6


def test_a_copy_is_independent():
    graft = shaken(encoder(), "lora(rank=2)")
    wanted = graft.model(X)
    twin = copy.deepcopy(graft)
    with torch.no_grad():
        for parameter in twin.parameters.values():
            parameter.add_(1)
    assert torch.equal(graft.model(X), wanted)
    assert tiny.relative(twin.model(X), wanted) > 1e-2


def test_shapes_alone():
    with torch.device("meta"):
        model = encoder()
    graft = attach(model, "lora(rank=2)", keep_base=False)
    real = attach(encoder(), "lora(rank=2)")
    assert {n: p.shape for n, p in graft.parameters.items()} == {
        n: p.shape for n, p in real.parameters.items()
    }
    assert model(X.to("meta")).is_meta


# ---- experts


def mixture(**changes):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=V, hidden_size=W, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, **changes,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    tiny.randomize(model, 3)
    return model.eval()


def transposed_mixture():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=V, hidden_size=W, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4, head_dim=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    tiny.randomize(model, 3)
    return model.eval()


EXPERTS = pytest.mark.parametrize("build", [mixture, transposed_mixture])


@EXPERTS
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_experts(build, how):
    model = build()
    model.set_experts_implementation(how)
    graft = shaken(model, "lora(rank=2, alpha=3, sites='experts')")
    stored_transposed = build is transposed_mixture
    plain = build()
    plain.set_experts_implementation(how)
    assert count(graft) == 2 * 4 * 2 * ((W + 2 * INNER) + (INNER + W))
    with torch.no_grad():
        for name, update in graft.additions():
            weight = plain.get_submodule(name.rpartition(".")[0]).get_parameter(update.parameter)
            for index in range(4):
                A = update.A[2 * index : 2 * index + 2]
                B = update.B[:, index::4]
                change = 1.5 * B @ A
                weight[index] += change.T if stored_transposed else change
    got, wanted = tiny.outputs(model), tiny.outputs(plain)
    assert tiny.relative(got, wanted) < 1e-5
    assert tiny.relative(got, tiny.outputs(build())) > 1e-2
    batch = tiny.batch()
    tiny.flat(model(**batch), batch["attention_mask"]).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in graft.parameters.values())
    assert not [n for n, p in model.named_parameters() if p.grad is not None and n not in graft.labels]


def test_one_weight_of_the_experts():
    graft = attach(mixture(), "lora(rank=2, sites='down_proj, q', ranks={'down_proj': 3})")
    assert {name.split(".lora_")[1] for name in graft.labels} == {
        "down_proj_default.A", "down_proj_default.B", "default.A", "default.B",
    }  # fmt: skip
    assert graft.parameters["model.layers.0.mlp.experts.lora_down_proj_default.A"].shape == (3 * 4, INNER)
    assert "gate_up_proj" in message(mixture(), "lora(sites='re:nothing')")


def test_experts_are_no_part_of_all_linear():
    assert not any("experts" in name for name in attach(mixture(), "lora()").labels)


# ---- what is refused, and quantized maps


class Quantized(nn.Linear):
    """A map whose weight is kept as integers, as those of quantized models."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features)
        self.step = float(of.weight.detach().abs().max()) / 127
        values = (of.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.bias = of.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float() * self.step, self.bias)


def test_a_quantized_map(tmp_path):
    def model() -> nn.Module:
        made = tiny.bare("bert")
        for block in made.encoder.layer:
            block.intermediate.dense = Quantized(block.intermediate.dense)
        return made

    graft = shaken(model(), "lora(rank=2, sites='up')")
    site = graft.model.encoder.layer[0].intermediate.dense
    A, B = factors(graft, "layer.0")
    x = torch.randn(3, W)
    wanted = F.linear(x, site.weight.float() * site.step, site.bias) + 2 * (x @ A.T @ B.T)
    torch.testing.assert_close(site(x), wanted)
    before = tiny.snapshot(graft.model)
    with pytest.raises(NotFoldable, match=r"lora\(\) cannot be folded.*int8"):
        graft.fold()
    assert all(torch.equal(value, before[name]) for name, value in tiny.snapshot(graft.model).items())
    graft.save(tmp_path)
    assert torch.equal(tiny.outputs(load(model(), tmp_path).model), tiny.outputs(graft.model))
    for text in ("dora(sites='up')", "pissa(sites='up')"):
        said = message(model(), text)
        assert text.split("(")[0] in said and "integers" in said and "lora()" in said and "Quantized" in said


@pytest.mark.parametrize("text", ["lora(sites='norms')", "dora(sites='norms')", "pissa(sites='norms')"])
def test_what_is_no_map(text):
    said = message(tiny.bare("bert"), text)
    assert text.split("(")[0] in said and "LayerNorm" in said and "use " in said


class Everything(nn.Module):
    """A user's own module: an embedding, a dilated and a grouped convolution, attention, a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, W)
        self.dilated = nn.Conv1d(W, W, 3, padding=2, dilation=2)
        self.grouped = nn.Conv1d(W, W, 3, padding=1, groups=4)
        self.mix = nn.MultiheadAttention(W, 4, batch_first=True)
        self.inner = nn.Linear(W, W)
        self.classifier = nn.Linear(W, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.grouped(self.dilated(self.embed(ids).transpose(1, 2))).transpose(1, 2)
        x, _ = self.mix(x, x, x)
        return self.classifier(self.inner(x).mean(1))


def test_a_module_of_the_users_own():
    model = Everything()
    graft = attach(model, "lora(rank=4, sites='embed, dilated, grouped, mix, inner') + head(classes=2)")
    assert len({name.rpartition(".")[0] for name in graft.labels if "lora" in name}) == 6
    optimizer = torch.optim.SGD(graft.param_groups(lr=0.1))
    before = tiny.snapshot(model)
    for _ in range(2):
        model(tiny.batch()["input_ids"]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tiny.snapshot(model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(graft.labels)


def test_a_model_that_is_one_map(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    graft = shaken(model, "lora(rank=2, sites='re:')")
    A, B = factors(graft)
    x = torch.randn(3, 6)
    wanted = model(x)
    torch.testing.assert_close(wanted, F.linear(x, model.weight + 2 * B @ A, model.bias))
    graft.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()  # PEFT replaces modules
    graft.fold()
    torch.testing.assert_close(model(x), wanted)
