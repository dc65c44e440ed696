"""VeRA, LoHa and LoKr against their formulas: values, numbers of parameters, what is shared, kept and refused."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
import zoo
from safetensors.torch import load_file
from shaken import ALL_KINDS, count, message, shaken
from torch import Tensor, nn

import graftkit
from graftkit import Backbone, UserError, attach, load
from graftkit.backbone.weights import Weight, weights_at
from graftkit.methods.loha import Product, matrix
from graftkit.methods.lokr import divisors

pytestmark = pytest.mark.sampled

EVERYWHERE = ("bert", "gpt2", "llama", "transformer", "mixtral", "resnet", "wav2vec2")


class Images(nn.Module):
    """Convolutions, of which one has groups and one a kernel of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 12, 3)
        self.second = nn.Conv2d(12, 8, (3, 2), groups=4)
        self.third = nn.Conv2d(8, 6, 1)


def all_weights(model: nn.Module, sites: str = "all-linear") -> list[Weight]:
    from graftkit.backbone import select

    backbone = Backbone(model)
    return [weight for site in select(backbone, sites) for weight in weights_at(backbone, site)]


def sizes(weight: Weight) -> tuple[int, int, int, int]:
    """How many matrices a weight is, and (out, in, kernel) of each."""
    experts = weight.shape[0] if weight.kind == "experts" else 1
    outputs, inputs, *kernel = weight.shape[1:] if weight.kind == "experts" else weight.shape
    return experts, outputs, inputs, math.prod(kernel)


def deltas(graft) -> list[tuple[Weight, nn.Module, Tensor]]:
    """Each weight, its update, and what folding adds to it in the layout of W."""
    (method,) = graft.method.methods
    found = []
    for _, weight in method.targets(graft.backbone):
        update = method.update_at(weight, graft.name)
        found.append((weight, update, update.delta(weight).detach()))
    return found


def parameters(text: str, model: nn.Module) -> int:
    return count(attach(model, text))


def near(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert tiny.relative(got, wanted) < 1e-5


# ---- numbers of parameters


@pytest.mark.parametrize("name", [model.name for model in zoo.MODELS])
def test_numbers_of_parameters(name):
    model = zoo.BY_NAME[name]
    weights = [sizes(weight) for weight in all_weights(model.fresh())]
    rank = 3
    assert parameters(f"vera(rank={rank})", model.fresh()) == sum(e * (rank + o) for e, o, _, _ in weights)
    assert parameters(f"loha(rank={rank})", model.fresh()) == sum(
        e * 2 * rank * (i * k + o) for e, o, i, k in weights
    )
    assert parameters(f"loha(rank={rank}, use_effective_conv2d=True)", model.fresh()) == sum(
        2 * rank * (i + o + rank * k) if k > 1 else e * 2 * rank * (i + o) for e, o, i, k in weights
    )


def lokr_count(
    rank: int, factor: int | None, both: bool, cores: bool, size: tuple[int, int, int, int]
) -> int:
    experts, outputs, inputs, kernel = size
    (out1, out2), (in1, in2) = divisors(outputs, factor), divisors(inputs, factor)
    first = rank * (out1 + in1) if both and rank < max(out1, in1) / 2 else out1 * in1
    if rank >= max(out2, in2) / 2:
        second = out2 * in2 * kernel
    elif cores and kernel > 1:
        second = rank * (out2 + in2 + rank * kernel)
    else:
        second = rank * (out2 + in2 * kernel)
    return experts * (first + second)


@pytest.mark.parametrize("name", [model.name for model in zoo.MODELS])
@pytest.mark.parametrize(
    "rank,factor,both,cores", [(1, None, False, False), (1, 2, True, True), (9, 4, True, True)]
)
def test_numbers_of_parameters_of_lokr(name, rank, factor, both, cores):
    model = zoo.BY_NAME[name]
    text = f"lokr(rank={rank}, factor={factor}, decompose_both={both}, use_effective_conv2d={cores})"
    wanted = sum(
        lokr_count(rank, factor, both, cores, sizes(weight)) for weight in all_weights(model.fresh())
    )
    assert parameters(text, model.fresh()) == wanted


@pytest.mark.parametrize("size", [*range(1, 200), 384, 1536, 3072, 30522])
@pytest.mark.parametrize("aim", [None, 1, 2, 7, 8, 16])
def test_divisors_are_those_of_peft(size, aim):
    factorization = pytest.importorskip("peft.tuners.lokr.layer").factorization
    assert divisors(size, aim) == factorization(size, -1 if aim is None else aim)


# ---- the formulas


@pytest.mark.parametrize("name", EVERYWHERE)
def test_vera_is_its_formula(name):
    graft = shaken(zoo.BY_NAME[name].fresh(), "vera(rank=5)")
    shared = graft.model.vera_projections_default
    for weight, update, delta in deltas(graft):
        experts, outputs, inputs, kernel = sizes(weight)
        b, d = update.b.view(experts, outputs), update.d.view(experts, 5)
        A, B = shared.A[:, : inputs * kernel], shared.B[:outputs]
        wanted = [torch.diag(b[e]) @ B @ torch.diag(d[e]) @ A for e in range(experts)]
        near(delta, torch.stack(wanted).view(weight.shape))


@pytest.mark.parametrize("name", EVERYWHERE)
def test_loha_is_its_formula(name):
    graft = shaken(zoo.BY_NAME[name].fresh(), "loha(rank=2, alpha=3)")
    for weight, update, delta in deltas(graft):
        near(delta, (1.5 * (update.w1_a @ update.w1_b) * (update.w2_a @ update.w2_b)).view(weight.shape))


def test_loha_with_cores_is_its_formula():
    graft = shaken(Images(), "loha(rank=2, alpha=3, use_effective_conv2d=True)")
    for weight, update, delta in deltas(graft):
        if sizes(weight)[3] == 1:
            assert not hasattr(update, "t1")
            continue
        wanted = torch.zeros(weight.shape)
        for o in range(weight.shape[0]):
            for i in range(weight.shape[1]):
                first = sum(
                    update.w1_a[p, o] * update.w1_b[r, i] * update.t1[p, r]
                    for p in range(2)
                    for r in range(2)
                )
                second = sum(
                    update.w2_a[p, o] * update.w2_b[r, i] * update.t2[p, r]
                    for p in range(2)
                    for r in range(2)
                )
                wanted[o, i] = 1.5 * (first * second).detach()
        near(delta, wanted)


@pytest.mark.parametrize(
    "text", ["lokr(rank=1)", "lokr(rank=1, decompose_both=True, alpha=3)", "lokr(rank=20, factor=2)"]
)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_lokr_is_its_formula(name, text):
    graft = shaken(zoo.BY_NAME[name].fresh(), text)
    for weight, update, delta in deltas(graft):
        experts, _, _, kernel = sizes(weight)
        out1, out2, in1, in2 = update.sizes
        first = update.w1 if hasattr(update, "w1") else update.w1_a @ update.w1_b
        second = update.w2 if hasattr(update, "w2") else update.w2_a @ update.w2_b
        first, second = first.view(experts, out1, in1), second.reshape(experts, out2, in2, kernel)
        wanted = [
            torch.stack([torch.kron(first[e], second[e, :, :, k]) for k in range(kernel)], dim=-1)
            for e in range(experts)
        ]
        near(delta, update.scale * torch.stack(wanted).view(weight.shape))


def test_lokr_with_cores_is_its_formula():
    graft = shaken(Images(), "lokr(rank=1, use_effective_conv2d=True)")
    for weight, update, delta in deltas(graft):
        if hasattr(update, "t2"):
            second = torch.einsum("ijkl,ip,jr->prkl", update.t2, update.w2_a, update.w2_b)
            near(delta, torch.kron(update.w1[:, :, None, None], second).view(weight.shape))
    assert any(hasattr(update, "t2") for _, update, _ in deltas(graft))


@ALL_KINDS
@pytest.mark.parametrize(
    "text",
    [
        "vera(rank=4)",
        "loha(rank=2)",
        "loha(rank=4)",
        "lokr(rank=1)",
        "lokr(rank=1, decompose_both=True)",
        "lokr(rank=9)",
    ],
)
def test_what_is_computed_is_what_is_folded(kind, text):
    graft = shaken(tiny.bare(kind), text)
    wanted = tiny.outputs(graft.model)
    graft.fold()
    near(tiny.outputs(graft.model), wanted)


# ---- ranks by site


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_ranks_and_alphas_by_site(method):
    text = f"{method}(rank=1, rank_pattern={{'blocks[-1:]': 2}}, alpha_pattern={{'q': 5}})"
    graft = shaken(tiny.bare("bert"), text)
    for name, module in graft.additions():
        rank = 2 if "layer.2" in name else 1
        assert module.scale == (5 / rank if "query" in name else 1)
        if method == "loha":
            assert module.w1_a.shape[1] == rank
        else:
            assert hasattr(module, "w2") == (rank >= max(module.sizes[1], module.sizes[3]) / 2)
    assert "blocks[9]" in message(tiny.bare("bert"), f"{method}(rank_pattern={{'blocks[9]': 2}})")
    assert "positive" in message(tiny.bare("bert"), f"{method}(rank_pattern={{'q': 0}})")


# ---- LoHa's product


def test_the_product_s_gradients():
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    flat = [random(5, 2), random(2, 4)]
    experts = [random(3, 5, 2), random(3, 2, 4)]
    cores = [random(2, 5), random(2, 4), random(2, 2, 3, 2)]
    for factors in (flat, experts, cores):
        other = [random(*factor.shape) for factor in factors]
        assert torch.autograd.gradcheck(Product.apply, (*factors, *other))
        near(Product.apply(*factors, *other).float(), (matrix(*factors) * matrix(*other)).float())


@pytest.mark.parametrize(
    "method,whole", [("loha(rank=2)", 0), ("loha(rank=7)", 1), ("lokr(rank=1)", 0), ("vera(rank=3)", 0)]
)
def test_how_many_whole_matrices_are_kept_for_the_way_back(method, whole):
    """LoHa of a high rank keeps dW alone and not its two factors; the others never form it."""
    model = nn.Sequential(nn.Linear(36, 49))
    graft = shaken(model, f"{method[:-1]}, sites='0')")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    base = {p.data_ptr() for p in model[0].parameters(recurse=False)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = graft.model(torch.randn(3, 36).requires_grad_())
    out.sum().backward()
    big = {t.data_ptr() for t in kept if t.numel() >= 36 * 49 and t.data_ptr() not in base}
    assert len(big) == whole


# ---- VeRA's projections


def projections(graft) -> nn.Module:
    return getattr(graft.model, f"vera_projections_{graft.name}")


def test_the_matrices_are_one_pair_for_all_maps():
    graft = attach(tiny.bare("bert"), "vera(rank=5)")
    shared = projections(graft)
    assert shared.A.shape == (5, tiny.INNER) and shared.B.shape == (tiny.INNER, 5)
    updates = [module for _, module in graft.additions() if module is not shared]
    assert len(updates) == 6 * tiny.BLOCKS and all(update.projections is shared for update in updates)
    twin = copy.deepcopy(graft)
    assert projections(twin) is not shared
    assert all(m.projections is projections(twin) for _, m in twin.additions() if m is not projections(twin))
    assert not {name for name in graft.labels if "projections" in name}


@pytest.mark.slow
def test_the_matrices_come_from_the_seed_and_have_kaiming_s_variance():
    first, same, other = (
        projections(attach(tiny.bare("bert"), f"vera(rank=400, seed={seed})")) for seed in (1, 1, 2)
    )
    assert torch.equal(first.A, same.A) and torch.equal(first.B, same.B)
    assert not torch.equal(first.A, other.A)
    for values in (first.A, first.B):
        assert float(values.var()) == pytest.approx(2 / values.shape[1], rel=0.05)


@pytest.mark.parametrize("kept", [True, False])
def test_the_matrices_are_kept_with_the_graft_or_drawn_again(kept, tmp_path):
    graft = shaken(tiny.bare("gpt2"), f"vera(rank=4, seed=3, save_projection={kept})")
    if kept:  # then it does not matter what the seed gives elsewhere
        with torch.no_grad():
            projections(graft).A.mul_(1.5)
    graft.save(tmp_path)
    stored = {key for path in tmp_path.glob("*.safetensors") for key in load_file(path)}
    assert any("vera_A" in key or "projections" in key for key in stored) == kept
    again = load(tiny.bare("gpt2"), tmp_path, name="other")
    assert torch.equal(tiny.outputs(again.model), tiny.outputs(graft.model))


def test_the_matrices_are_frozen_and_go_with_the_graft():
    graft = attach(tiny.bare("bert"), "vera(rank=4)")
    before = {name: tensor.clone() for name, tensor in projections(graft).named_buffers()}
    optimizer = torch.optim.AdamW(graft.param_groups())
    for _ in range(2):
        tiny.flat(graft.model(**tiny.batch()), tiny.batch()["attention_mask"]).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in projections(graft).named_buffers())
    attach(graft.backbone, "vera(rank=2, seed=5)", name="second")
    assert graft.model.vera_projections_second.A.shape == (2, tiny.INNER)
    assert torch.equal(projections(graft).A, before["A"])


# ---- several grafts in one batch


@ALL_KINDS
@pytest.mark.parametrize(
    "text", ["vera(rank=4)", "loha(rank=2)", "lokr(rank=1)", "adalora(rank=3, target_rank=2)"]
)
def test_rows_of_one_batch_through_their_own_grafts(kind, text):
    model, grafts = tiny.bare(kind), {}
    for seed, name in enumerate(("first", "second")):
        grafts[name] = shaken(model, text, name=name, seed=seed)
    rows = ["first", None, "second", "first"]
    given = tiny.batch(rows=4)
    with graftkit.using(model, rows=rows), torch.no_grad():
        together = model(**given).last_hidden_state
    for row, name in enumerate(rows):
        with graftkit.using(model, [name] if name else []), torch.no_grad():
            alone = model(**{key: value[row : row + 1] for key, value in given.items()}).last_hidden_state
        real = given["attention_mask"][row].bool()
        near(together[row, real], alone[0, real])


# ---- what is refused


@pytest.mark.parametrize("method", ["vera", "loha", "lokr", "adalora"])
@pytest.mark.parametrize("options", ["rank=0", "rank=1.5", "lr=0", "sites='nowhere'", "sites='norms'"])
def test_bad_options(method, options):
    told = message(tiny.bare("bert"), f"{method}({options})")
    assert method in told and options.partition("=")[0].replace("sites", "selection") in told


@pytest.mark.parametrize(
    "text", ["loha(alpha=0)", "lokr(factor=0)", "lokr(alpha=-1)", "vera(dropout=1)", "vera(seed=-1)"]
)
def test_options_out_of_bounds(text):
    with pytest.raises(UserError, match=text.split("(")[0]):
        attach(tiny.bare("bert"), text)
