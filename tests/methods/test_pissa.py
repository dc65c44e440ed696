"""pissa(): the principal part of a weight trained in its place, while the weight itself stays."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from custom_models import MODELS, given, gradients, grafted, make, mixture, same_as_base, transposed_mixture
from shaken import ALL_KINDS, count, message, shaken
from torch import nn
from torch.nn import functional as F

from graftkit import attach, detach, load
from graftkit.methods import pissa
from graftkit.methods.pissa import Principal

pytestmark = pytest.mark.sampled

SITES = {
    "MLP": "lin0, lin1", "EmbConv1D": "emb, conv1d", "EmbConv1D with padding": "emb", "ScaledEmbedding": "emb",
    "MHA": "mha", "MHA, batch first": "mha, lin0",
}  # fmt: skip
NAMES = [name for name in MODELS if "Groups" not in name and "Depthwise" not in name]


def updates(graft) -> list[tuple[str, Principal]]:
    return [(name, module) for name, module in graft.additions() if isinstance(module, Principal)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", ["", ", iterations=0, use_rslora=True, alpha=3, dropout=0.3"])
def test_it_starts_as_the_base(name, more):
    graft = attach(make(name), f"pissa(rank=2, sites='{SITES.get(name, 'all-linear')}'{more})")
    assert same_as_base(name, graft)
    for _, update in updates(graft):
        assert update.A.any() and update.B.any()


def test_the_factors_are_the_best_approximation():
    torch.manual_seed(0)
    layer = nn.Linear(40, 50)
    model = nn.Sequential(layer, nn.Linear(50, 2))
    for text, slack in (("iterations=0", 1e-5), ("iterations=8", 1e-3)):
        graft = attach(model, f"pissa(rank=4, alpha=12, sites='re:0', {text})", name="a")
        ((_, update),) = updates(graft)
        left = layer.weight - 3 * update.B @ update.A
        least = torch.linalg.svdvals(layer.weight.detach())[4:].square().sum().sqrt()
        assert float(left.norm() / least - 1) < slack
        # as in the paper, both factors have the same share of the singular values
        torch.testing.assert_close(update.A @ update.A.T, update.B.T @ update.B, rtol=1e-3, atol=1e-3)
        detach(graft)


@pytest.mark.parametrize("name", ["MLP", "EmbConv1D", "Conv2d strided", "Conv2d dilated", "Conv3d"])
def test_it_is_lora_on_the_rest_of_the_weight(name):
    """Against the paper's form: the weight holds W - s B0 A0, and s B A stands beside it."""
    graft = grafted(name, f"pissa(rank=2, alpha=3, sites='{SITES.get(name, 'all-linear')}')")
    twin, x = make(name), given(name)
    for path, update in updates(graft):
        owner = twin.get_submodule(path.rpartition(".")[0])
        transposed = update.kind in ("transposed", "embedding")
        weight = owner._parameters.pop("weight").detach()
        rows = weight.T if transposed else weight
        rest = rows - 1.5 * (update.B0.flatten(1) @ update.A0.flatten(1)).view(rows.shape)
        new = rest + 1.5 * (update.B.flatten(1) @ update.A.flatten(1)).view(rows.shape)
        owner.weight = new.T if transposed else new
    wanted = gradients(twin, x)
    theirs = {key: p.grad for key, p in graft.parameters.items()}
    graft.model.zero_grad()
    assert tiny.relative(gradients(graft.model, x), wanted) < 1e-5
    for key, parameter in graft.parameters.items():
        torch.testing.assert_close(parameter.grad, theirs[key], rtol=1e-4, atol=1e-5)
    graft.fold()
    assert tiny.relative(graft.model(x).detach(), wanted) < 1e-5


@ALL_KINDS
def test_what_is_stored_needs_no_decomposition(kind, tmp_path, monkeypatch):
    graft = shaken(tiny.bare(kind), "pissa(rank=3)")
    wanted = tiny.outputs(graft.model)
    graft.save(tmp_path)
    kept = {name for name in graft.tensors if name.endswith(("A0", "B0"))}
    assert len(kept) == len(graft.labels) and not kept & set(graft.labels)

    def another(W, rank, scale, iterations):  # of another machine: other signs, another order
        B, A = principal(W, rank, scale, iterations)
        return -B.flip(-1), -A.flip(-2)

    principal = pissa.principal
    monkeypatch.setattr(pissa, "principal", another)
    assert torch.equal(tiny.outputs(load(tiny.bare(kind), tmp_path).model), wanted)


def test_the_base_is_untouched_and_frozen_factors_stay():
    model = tiny.bare("bert")
    before = tiny.snapshot(model)
    graft = attach(model, "pissa(rank=3)")
    start = tiny.snapshot(model)
    assert all(torch.equal(start[name], value) for name, value in before.items())
    groups = graft.param_groups(lr=0.01)
    assert {group["weight_decay"] for group in groups} == {0.0}
    optimizer = torch.optim.AdamW(groups)
    given = tiny.batch()
    for _ in range(2):
        tiny.flat(model(**given), given["attention_mask"]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tiny.snapshot(model)
    assert {n for n in after if not torch.equal(after[n], start[n])} == set(graft.labels)


def test_parameters_and_ranks():
    W, INNER, L = tiny.WIDTH, tiny.INNER, tiny.BLOCKS
    maps = [(W, W)] * 4 + [(W, INNER), (INNER, W)]
    assert count(attach(tiny.bare("bert"), "pissa(rank=5)")) == L * sum(5 * (i + o) for i, o in maps)
    graft = attach(tiny.bare("bert"), "pissa(rank=5, rank_pattern={'q': 2}, alpha_pattern={'q': 3})")
    scales = {update.scale for name, update in updates(graft) if "query" in name}
    assert scales == {3 / 2}
    said = message(tiny.bare("bert"), f"pissa(rank={W + 1})")
    assert "pissa()" in said and f"only {W} singular values" in said and "lora()" in said and "query" in said
    said = message(make("Conv2dGroups"), "pissa(rank=2, sites='conv2d')")
    assert "pissa()" in said and "Conv2d" in said and "lora()" in said


def test_experts():
    for build in (mixture, transposed_mixture):
        graft = attach(build(), "pissa(rank=2, alpha=3, iterations=0, sites='experts')")
        assert torch.equal(tiny.outputs(graft.model), tiny.outputs(build()))
        for path, update in updates(graft):
            owner = graft.model.get_submodule(path.rpartition(".")[0])
            for index in range(4):
                own = owner.get_parameter(update.parameter)[index]
                own = own.T if build is transposed_mixture else own
                B, A = update.B[:, index::4], update.A[2 * index : 2 * index + 2]
                left = (own - 1.5 * B @ A).norm()
                least = math.sqrt(float(torch.linalg.svdvals(own.detach())[2:].square().sum()))
                assert float(left) == pytest.approx(least, rel=1e-4)
        graft = shaken(build(), "pissa(rank=2, sites='experts')")
        wanted = tiny.outputs(graft.model)
        graft.fold()
        assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5


def test_dropout_acts_on_the_input_of_the_change():
    graft = grafted("MLP", "pissa(rank=3, dropout=0.5, sites='lin0')")
    ((_, update),), site, x = updates(graft), graft.model.lin0, given("MLP")
    site.train()
    torch.manual_seed(3)
    got = site(x)
    torch.manual_seed(3)
    change = update.B @ update.A - update.B0 @ update.A0
    torch.testing.assert_close(got, F.linear(x, site.weight, site.bias) + F.linear(F.dropout(x, 0.5), change))
