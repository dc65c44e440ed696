"""lora() and its kin on weights that no module multiplies by alone, that are integers, and in modules of one's own."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from custom_models import mixture, transposed_mixture
from shaken import count, message, shaken
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graftkit import NotFoldable, attach, detach, load
from graftkit.methods.shared.low_rank import LowRank

pytestmark = pytest.mark.sampled

W, L, INNER, V = tiny.WIDTH, tiny.BLOCKS, tiny.INNER, tiny.VOCABULARY


def factors(graft, part: str = "") -> list[Tensor]:
    return [p.detach() for name, p in graft.parameters.items() if part in name]


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
    graft = attach(mixture(), "lora(rank=2, sites='down_proj, q', rank_pattern={'down_proj': 3})")
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
