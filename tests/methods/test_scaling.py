"""(IA)^3, norms and biases against formulas and plain implementations."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import zoo
from shaken import ALL_KINDS, count, message, shaken
from torch import Tensor, nn

from graftkit import NotFoldable, attach, detach, load
from graftkit.methods.base import read

pytestmark = pytest.mark.sampled

L, W, F = tiny.BLOCKS, tiny.WIDTH, tiny.INNER
KV = {"bert": W, "gpt2": W, "llama": W // 2}


# ---- (IA)^3


@ALL_KINDS
def test_ia3_parameter_counts(kind):
    keys_values = (
        3 * W if kind == "gpt2" else 2 * KV[kind]
    )  # its keys and values come from one map with the queries
    for text, wanted in (
        ("ia3()", L * (keys_values + F)),
        ("ia3(feedforward='none')", L * keys_values),
        ("ia3(sites='none')", L * F),
        (
            "ia3(sites='blocks[-1:].v', feedforward='blocks[0].down')",
            keys_values // (1 if kind == "gpt2" else 2) + F,
        ),
        ("ia3(sites='o,up', feedforward='none')", L * (W + F)),
    ):
        assert count(attach(tiny.bare(kind), text)) == wanted, text


def vectors(graft) -> dict[str, Tensor]:
    return {name.partition(".ia3_")[0]: p.detach().flatten() for name, p in graft.parameters.items()}


def test_ia3_is_that_of_the_paper_on_bert():
    """softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V), and W2 (l_ff * f(W1 x)), written out for a block."""
    graft = shaken(tiny.bare("bert"), "ia3()")
    scale = vectors(graft)
    block, prefix = graft.model.encoder.layer[1], "encoder.layer.1"
    x = torch.randn(2, 5, W, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), graft.disabled():
        part = block.attention.self
        split = (2, 5, tiny.HEADS, W // tiny.HEADS)
        q = part.query(x).view(split).transpose(1, 2)
        k = (part.key(x) * scale[f"{prefix}.attention.self.key"]).view(split).transpose(1, 2)
        v = (part.value(x) * scale[f"{prefix}.attention.self.value"]).view(split).transpose(1, 2)
        mixed = (q @ k.mT / split[3] ** 0.5).softmax(-1) @ v
        y = block.attention.output(mixed.transpose(1, 2).reshape(x.shape), x)
        inner = block.intermediate(y) * scale[f"{prefix}.output.dense"]
        wanted = block.output(inner, y)
    with torch.no_grad():
        got = block(x)
    got = got[0] if isinstance(got, tuple) else got
    assert tiny.relative(got, wanted) < 1e-6


def by_hand(module: nn.Module, x: Tensor, scale: Tensor, at_input: bool) -> Tensor:
    """A convolution, (rows, channels, ...), or a linear map, (..., channels), scaled at one of its ends."""
    shape = [1, -1] + [1] * (x.dim() - 2) if isinstance(module, nn.modules.conv._ConvNd) else [-1]
    return module(x * scale.view(shape)) if at_input else module(x) * scale.view(shape)


@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize(
    "module,x",
    [
        (nn.Linear(6, 8, bias=False), torch.randn(3, 4, 6)),
        (nn.Linear(6, 8), torch.randn(6)),
        (nn.Conv1d(6, 8, 3, groups=2), torch.randn(3, 6, 9)),
        (nn.Conv2d(6, 8, 3, stride=2, dilation=2, padding=1), torch.randn(3, 6, 9, 7)),
        (nn.Conv2d(6, 12, (3, 1), groups=3, padding="same", padding_mode="reflect"), torch.randn(2, 6, 5, 5)),
        (nn.Conv3d(6, 6, 2, groups=6, bias=False), torch.randn(2, 6, 3, 4, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_ia3_on_maps_and_convolutions(module, x, at_input):
    plain, model = copy.deepcopy(module), nn.Sequential(copy.deepcopy(module))
    text = "ia3(sites='none', feedforward='0')" if at_input else "ia3(sites='0', feedforward='none')"
    graft = shaken(model, text)
    with torch.no_grad():
        wanted = by_hand(plain, x, vectors(graft)["0"], at_input)
        assert tiny.relative(model(x), wanted) < 1e-6
        named = {"input": x}
        assert torch.equal(model[0](**named), model(x))
        assert tiny.relative(graft.fold()(x), wanted) < 1e-5
    if isinstance(module, nn.modules.conv._ConvNd):
        with torch.no_grad():  # one example without a row in front
            assert tiny.relative(model(x[0]), wanted[0]) < 1e-5


@pytest.mark.parametrize("separate", [False, True])
def test_ia3_on_multihead_attention(separate):
    sizes = {"kdim": 6, "vdim": 5} if separate else {}
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    tiny.randomize(attention, 3)
    plain, model = copy.deepcopy(attention), nn.ModuleDict({"mix": attention})
    graft = shaken(model, "ia3(sites='mix', feedforward='none')")
    assert count(graft) == 3 * 8
    q, k, v = (
        torch.randn(2, 3, 8),
        torch.randn(2, 4, 6 if separate else 8),
        torch.randn(2, 4, 5 if separate else 8),
    )
    scale = next(iter(graft.parameters.values())).detach()
    with torch.no_grad():
        parts = scale.chunk(3)
        if separate:
            weights = (plain.q_proj_weight, plain.k_proj_weight, plain.v_proj_weight)
            for weight, part in zip(weights, parts, strict=True):
                weight.mul_(part)
        else:
            plain.in_proj_weight.mul_(scale)
        plain.in_proj_bias.mul_(scale.flatten())
        wanted = plain(q, k, v)[0]
        assert tiny.relative(attention(q, k, v)[0], wanted) < 1e-5
    attention(q, k, v)[0].square().sum().backward()
    assert next(iter(graft.parameters.values())).grad.any()
    with pytest.raises(AssertionError):  # also after an error nothing is left in the place of the weights
        attention(q[..., :5], k, v)
    with torch.no_grad(), graft.disabled():
        assert not torch.equal(attention(q, k, v)[0], wanted)
    detach(graft)
    assert all(isinstance(p, nn.Parameter) for p in vars(attention)["_parameters"].values() if p is not None)
    assert not {"in_proj_weight", "q_proj_weight", "in_proj_bias"} & set(vars(attention))


def test_what_is_both_inner_and_a_site_is_scaled_at_its_input():
    graft = attach(tiny.bare("bert"), "ia3(sites='all-linear')")
    assert graft.parameters["encoder.layer.0.output.dense.ia3_default.scale"].shape == (1, F)
    assert count(graft) == L * (4 * W + F + F)


def test_ia3_scales_convolutions_where_there_is_no_attention():
    model = zoo.BY_NAME["resnet20"].fresh()
    wanted = sum(
        m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "conv1"
    )
    assert count(attach(model, "ia3()")) == wanted


def test_weight_decay_does_not_pull_the_vectors_to_zero():
    graft = attach(tiny.bare("bert"), "ia3() + norms(sites='embeddings.LayerNorm')")
    assert {group["weight_decay"] for group in graft.param_groups(weight_decay=0.3)} == {0.0}


def test_what_ia3_refuses():
    assert "lora" in message(nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), "ia3()")
    text = message(tiny.bare("bert"), "ia3(sites='norms')")
    assert "ia3()" in text and "LayerNorm" in text and "linear layers or convolutions" in text
    assert "lora" in message(tiny.bare("bert"), "ia3(sites='none', feedforward='none')")


def test_ia3_is_not_folded_into_what_it_cannot_be():
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 3, 2)))
    graft = shaken(module, "ia3(sites='0')")
    before = tiny.snapshot(module)
    with pytest.raises(
        NotFoldable, match=r"ia3\(\) cannot be folded into '0'.*computed from other parameters"
    ):
        graft.fold()
    after = tiny.snapshot(module)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# ---- norms


def norm_sizes(model: nn.Module) -> int:
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    return sum(p.numel() for m in norms for p in m.parameters(recurse=False))


@pytest.mark.parametrize("name", ["bert", "llama", "qwen3", "vit", "resnet", "convnext"])
def test_norms_trains_all_gains_and_biases(name):
    model = zoo.BY_NAME[name].fresh()
    graft = attach(model, "norms()")
    assert count(graft) == norm_sizes(model) > 0
    assert {group.weight_decay for group in graft.labels.values()} == {0.0}


def test_norms_counts_by_formula():
    assert count(attach(tiny.bare("bert"), "norms()")) == (2 * L + 1) * 2 * W
    assert count(attach(tiny.bare("bert"), "norms(sites='blocks[-1:].norms')")) == 2 * 2 * W
    assert count(attach(tiny.bare("llama"), "norms()")) == (2 * L + 1) * W
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.BatchNorm1d(4, affine=False))
    assert count(attach(model, "norms()")) == 2 * 4 + 4


def step(graft, x: Tensor) -> None:
    graft.model.train()
    optimizer = torch.optim.SGD(graft.param_groups(lr=0.1))
    graft.model(x).square().sum().backward()
    optimizer.step()
    graft.model.eval()


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name or "tracked" in name}


@pytest.mark.parametrize("moves", [False, True])
def test_statistics_move_and_are_saved_only_if_asked(moves, tmp_path):
    def fresh() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).eval()

    x = torch.randn(6, 3, 4, 4) * 3 + 1
    model, before = fresh(), statistics(fresh())
    graft = attach(model, f"norms(statistics={moves})")
    step(graft, x)
    after = statistics(model)
    assert all(torch.equal(after[name], before[name]) != moves for name in before)
    wanted = model(x).detach()
    graft.save(tmp_path / "graft")
    again = load(fresh(), tmp_path / "graft")
    assert torch.equal(again.model(x), wanted)
    plain = detach(again)
    assert torch.equal(plain(x), fresh()(x))
    assert all(torch.equal(value, before[name]) for name, value in statistics(plain).items())


def test_what_norms_refuses():
    text = message(zoo.BY_NAME["squeezenet"].fresh(), "norms()")
    assert "SqueezeNet" in text and "bitfit()" in text
    assert "running statistics" in message(tiny.bare("bert"), "norms(statistics=True)")
    assert "none of them are norms" in message(tiny.bare("bert"), "norms(sites='q')")


# ---- biases


def test_bitfit_counts_and_its_smaller_form():
    assert count(attach(tiny.bare("bert"), "bitfit()")) == L * (4 * W + F + W + 2 * W)
    assert count(attach(tiny.bare("bert"), "bitfit(sites='q,up')")) == L * (W + F)
    assert count(attach(tiny.bare("bert"), "bitfit(sites='blocks[0], pooler')")) == 7 * W + F + W
    model = zoo.BY_NAME["transformer"].fresh()
    assert count(attach(model, "bitfit()")) == zoo.BLOCKS * (
        3 * zoo.WIDTH + zoo.WIDTH + zoo.INNER + 3 * zoo.WIDTH
    )
    assert "blocks[0].v" in message(tiny.bare("llama"), "bitfit(sites='blocks[0].v')")


def test_only_biases_move():
    graft = attach(tiny.bare("bert"), "bitfit()")
    assert all(name.endswith("bias") for name in graft.labels)
    assert read("bitfit(sites='q')") == read(str(graft.method.methods[0].__class__(sites="q")))


# ---- folding beside others


@pytest.mark.parametrize(
    "text", ["lora(rank=2) + ia3()", "ia3() + lora(rank=2)", "lora(rank=2) + dora(rank=2)"]
)
def test_what_acts_on_one_module_together_is_not_folded(text):
    graft = shaken(tiny.bare("bert"), text)
    before = tiny.snapshot(graft.model)
    with pytest.raises(NotFoldable, match="the same graft, which acts there too"):
        graft.fold()
    after = tiny.snapshot(graft.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sums_in_one_graft_and_in_several_are_folded():
    graft = shaken(tiny.bare("bert"), "lora(rank=2) + vera(rank=3) + norms()")
    wanted = tiny.outputs(graft.model)
    assert tiny.relative(tiny.outputs(graft.fold()), wanted) < 1e-5
    model = tiny.bare("gpt2")
    one = shaken(model, "ia3(feedforward='none')", name="one")
    two = shaken(model, "lora(rank=2)", name="two", seed=6)
    wanted = tiny.outputs(model)
    with pytest.raises(
        NotFoldable, match=r"'two' cannot be folded into 'h\.0\.attn\.c_attn'.*the graft 'one'"
    ):
        two.fold()  # it is added to what the first graft scales
    one.fold()
    assert tiny.relative(tiny.outputs(model), wanted) < 1e-5
    two.fold()
    assert tiny.relative(tiny.outputs(model), wanted) < 1e-5
    two.unfold()
    one.unfold()
    assert torch.equal(tiny.outputs(model), wanted)
