"""dora() against its formula written out, on every kind of weight: outputs, gradients, folding."""

from __future__ import annotations

import pytest
import tiny
import torch
from custom_models import MODELS, given, gradients, grafted, make, mixture, same_as_base, transposed_mixture
from shaken import count, shaken
from torch import Tensor, nn
from torch.nn import functional as F

from graftkit import attach, load
from graftkit.methods.dora import Direction
from graftkit.methods.shared.low_rank import LowRank

pytestmark = pytest.mark.sampled

W, L, INNER = tiny.WIDTH, tiny.BLOCKS, tiny.INNER


def direction(weight: Tensor, update: LowRank) -> Tensor:
    """m (W + s B A) / ||W + s B A|| by rows for W (out, ...); no gradient through the norm."""
    rows = weight.flatten(1) + update.scale * update.B.flatten(1) @ update.A.flatten(1)
    rows = update.m.view(-1, 1) * rows / rows.detach().norm(dim=1, keepdim=True)
    return rows.view(weight.shape)


SITES = {
    "MLP": "lin0, lin1", "EmbConv1D": "emb, conv1d", "EmbConv1D with padding": "emb", "ScaledEmbedding": "emb",
    "MHA": "mha", "MHA, batch first": "mha",
}  # fmt: skip
NAMES = [name for name in MODELS if "Groups" not in name and "Depthwise" not in name and "MHA" not in name]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_formula(name):
    """On a twin whose weights are computed from ours, so that autograd gives the gradients to compare."""
    graft = grafted(name, f"dora(rank=3, alpha=4, sites='{SITES.get(name, 'all-linear')}')")
    twin = make(name)
    for path, update in graft.additions():
        owner = twin.get_submodule(path.rpartition(".")[0])
        is_stored_transposed = update.kind in ("transposed", "embedding")
        weight = owner._parameters.pop("weight").detach()
        for key in ("A", "B", "m"):
            setattr(update, f"own_{key}", getattr(update, key))
        new = direction(weight.T if is_stored_transposed else weight, update)
        owner.weight = new.T if is_stored_transposed else new
    x = given(name)
    wanted = gradients(twin, x)
    theirs = {key: p.grad for key, p in graft.parameters.items()}
    graft.model.zero_grad()
    got = gradients(graft.model, x)
    assert tiny.relative(got, wanted) < 1e-5
    assert tiny.relative(make(name)(x).detach(), wanted) > 1e-3
    for key, parameter in graft.parameters.items() if "padding" not in name else ():  # there as PEFT's
        torch.testing.assert_close(parameter.grad, theirs[key], rtol=1e-4, atol=1e-5, msg=key)
    graft.fold()
    assert tiny.relative(graft.model(x).detach(), wanted) < 1e-5


@pytest.mark.parametrize("name", [*NAMES, "MHA", "MHA, batch first"])
def test_it_starts_as_the_base(name):
    for text in (
        f"dora(rank=3, sites='{SITES.get(name, 'all-linear')}')",
        f"dora(rank=3, sites='{SITES.get(name, 'all-linear')}', dropout=0.4)",
    ):
        graft = attach(make(name), text)
        assert same_as_base(name, graft)
        graft.fold()
        assert tiny.relative(graft.model(given(name)), make(name)(given(name))) < 1e-6


def test_packed_attention_and_experts():
    graft = grafted("MHA", "dora(rank=3, sites='mha')")
    twin, x = make("MHA"), given("MHA")
    with torch.no_grad():
        for path, update in graft.additions():
            if isinstance(update, Direction):
                weight = twin.get_submodule(path.rpartition(".")[0]).get_parameter(update.parameter)
                weight.copy_(direction(weight, update))
    assert tiny.relative(graft.model(x), twin(x)) < 1e-5
    for build, transposed in ((mixture, False), (transposed_mixture, True)):
        graft, twin = shaken(build(), "dora(rank=2, sites='experts')"), build()
        with torch.no_grad():
            for path, update in graft.additions():
                if not isinstance(update, Direction):
                    continue
                weight = twin.get_submodule(path.rpartition(".")[0]).get_parameter(update.parameter)
                for index in range(4):
                    own = weight[index].T if transposed else weight[index]
                    rows = own + 2 * update.B[:, index::4] @ update.A[2 * index : 2 * index + 2]
                    rows = update.m[index][:, None] * rows / rows.norm(dim=1, keepdim=True)
                    weight[index] = rows.T if transposed else rows
        assert tiny.relative(tiny.outputs(graft.model), tiny.outputs(twin)) < 1e-5
        assert tiny.relative(tiny.outputs(graft.model), tiny.outputs(build())) > 1e-2


def test_dropout_acts_on_what_the_update_sees():
    graft = grafted("MLP", "dora(rank=3, dropout=0.5, sites='lin0')")
    (_, update), site = next(a for a in graft.additions() if isinstance(a[1], Direction)), graft.model.lin0
    x = given("MLP")
    site.train()
    torch.manual_seed(3)
    got = site(x)
    torch.manual_seed(3)
    change = direction(site.weight, update) - site.weight
    torch.testing.assert_close(got, F.linear(x, site.weight, site.bias) + F.linear(F.dropout(x, 0.5), change))


def test_parameters():
    maps = [(W, W)] * 4 + [(W, INNER), (INNER, W)]
    assert count(attach(tiny.bare("bert"), "dora(rank=5)")) == L * sum(5 * (i + o) + o for i, o in maps)
    assert count(attach(make("Conv2d"), "dora(rank=5, sites='conv2d')")) == 5 * (6 * 9 + 8) + 8
    assert count(attach(make("EmbConv1D"), "dora(rank=5, sites='emb')")) == 5 * (50 + 5) + 5


def test_lengths_are_not_decayed():
    graft = attach(make("Conv2d"), "dora(rank=2, sites='conv2d, lin0', loraplus_lr_ratio=4)")
    groups = {id(p): group for group in graft.param_groups() for p in group["params"]}
    for name, parameter in graft.parameters.items():
        group = groups[id(parameter)]
        assert group["weight_decay"] == (0.0 if name.endswith(".m") else 0.01), name
        assert group["lr"] == pytest.approx(4e-3 if name.endswith(".B") else 1e-3)


def test_a_row_of_zeros():
    model = make("MLP")
    with torch.no_grad():
        model.lin0.weight[3] = 0
    x = given("MLP")
    wanted = model(x)
    graft = attach(model, "dora(rank=3)")
    assert torch.equal(graft.model(x), wanted)
    graft.model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in graft.parameters.values())


def test_weights_that_change_after_attach():
    """Norms are those of the weight as it is: a base may be loaded after grafting."""
    graft = grafted("MLP", "dora(rank=3)")
    x = given("MLP")
    before = graft.model(x)
    other = make("MLP")
    tiny.randomize(other, 99)
    graft.model.load_state_dict(other.state_dict(), strict=False)
    with torch.no_grad():
        for path, update in graft.additions():
            if isinstance(update, Direction):
                weight = other.get_submodule(path.rpartition(".")[0]).weight
                weight.copy_(direction(weight, update))
    assert tiny.relative(graft.model(x), other(x)) < 1e-5
    assert tiny.relative(before, other(x)) > 1e-2


def test_bf16_without_autocast():
    site = nn.Linear(W, INNER).bfloat16()
    graft = attach(nn.Sequential(site, nn.Linear(INNER, 2).bfloat16()), "dora(rank=3, sites='re:0')")
    with torch.no_grad():
        for parameter in graft.parameters.values():
            assert parameter.dtype == torch.float32
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    update = next(module for _, module in graft.additions() if isinstance(module, Direction))
    x = torch.randn(40, W).bfloat16()
    wanted = F.linear(x.float(), direction(site.weight.float(), update), site.bias.float())
    got = site(x)
    assert got.dtype == torch.bfloat16 and tiny.relative(got.detach(), wanted.detach()) < 2e-2
    got.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in graft.parameters.values())


def test_two_on_one_map_follow_each_other(tmp_path):
    model = make("MLP")
    x = given("MLP")
    first = attach(model, "dora(rank=3, sites='lin0')", name="first")
    second = attach(model, "dora(rank=2, sites='lin0')", name="second")
    with torch.no_grad():
        for graft in (first, second):
            for parameter in graft.parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    site = model.lin0
    updates = [next(m for _, m in g.additions() if isinstance(m, Direction)) for g in (first, second)]
    h = given("MLP")
    own = F.linear(h, direction(site.weight, updates[0]))
    # the second sees what the first gives as the map's own
    low = updates[1].scale * h @ updates[1].A.T @ updates[1].B.T
    norm = (site.weight + updates[1].scale * updates[1].B @ updates[1].A).norm(dim=1)
    torch.testing.assert_close(site(h), (own + low) * updates[1].m / norm + site.bias)
    wanted = model(x)
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    again = make("MLP")
    load(again, tmp_path / "first", name="first")
    load(again, tmp_path / "second", name="second")
    assert torch.equal(again(x), wanted)


@pytest.mark.parametrize("before", ("lora", "dora", "loha"))
def test_dropout_leaves_what_acts_before_as_it_is(before):
    """With a dropout that drops nothing, training computes what evaluation does, also behind another method."""
    model = make("MLP")
    for name, text in (("first", f"{before}(rank=3, sites='lin0')"), ("second", "dora(rank=2, sites='lin0', dropout=1e-12)")):  # fmt: skip
        shaken(model, text, name=name)
    wanted = model.lin0(given("MLP"))
    model.lin0.train()
    torch.testing.assert_close(model.lin0(given("MLP")), wanted)


def test_a_base_in_double_precision():
    model, twin = make("MLP"), make("MLP").double()
    for each in (model, twin):
        torch.manual_seed(0)
        shaken(each, "dora(rank=3, sites='lin0, lin1')")
    wanted, got = model(given("MLP")), twin(given("MLP").double())
    assert got.dtype == torch.float64 and tiny.relative(got, wanted) < 1e-5
