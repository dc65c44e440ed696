"""Weighted sums of grafts, against sums by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
import zoo
from shaken import ALL_KINDS
from side_by_side import HEADS, NAMES, refusal, several, states

from graftkit import using

pytestmark = pytest.mark.sampled


@pytest.mark.parametrize(
    "text",
    ["lora(rank={})", "loha(rank={})", "vera(rank={})", "lokr(rank={})", "adalora(rank={}, target_rank=1)"],
)
@ALL_KINDS
def test_weighted_sum_of_updates(kind, text):
    """Against the base with the weighted sum of what each graft adds to the weights."""
    model = tiny.bare(kind)
    grafts = several(model, tuple(text.format(rank) for rank in (2, 3)))
    base = tiny.snapshot(model)
    weights = (0.7, -1.5)
    wanted = tiny.bare(kind)
    sums = {name: p.detach().clone() for name, p in wanted.named_parameters()}
    for graft, weight in zip(grafts, weights):
        graft.fold()
        for name, p in model.named_parameters():
            if name in sums:
                sums[name] += weight * (p.detach() - base[name])
        graft.disable()
    with torch.no_grad():
        for name, p in wanted.named_parameters():
            p.copy_(sums[name])
    with using(model, dict(zip(NAMES, weights))):
        assert tiny.relative(tiny.outputs(model), tiny.outputs(wanted)) < 1e-5


@ALL_KINDS
def test_weighted_sum_of_trained_parameters_is_put_back(kind):
    model = tiny.bare(kind)
    grafts = several(model, ("unfreeze('blocks')", "norms()"))
    base = {name: tensor.clone() for name, tensor in model.named_parameters()}
    wanted = {name: tensor.clone() for name, tensor in base.items()}
    for graft, weight in zip(grafts, (0.25, 2.0)):
        for name, trained in graft.put_away.tensors.items():
            wanted[name] += weight * (trained - base[name])
    with using(model, dict(zip(NAMES, (0.25, 2.0)))):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), wanted[name])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base[name])
    with using(model, "support-de"):
        alone = tiny.outputs(model)
    with using(model, {"support-de": 1.0}):
        assert tiny.relative(tiny.outputs(model), alone) < 1e-6


def test_weighted_sum_of_adapters_and_scalings():
    """One block's worth, by hand: h + sum of w (change(h)), and x (1 + sum of w (l - 1))."""
    model = tiny.bare("bert")
    grafts = several(
        model, ("adapter(bottleneck=3, norms=False)", "adapter(bottleneck=4, norms=False)", "ia3()")
    )
    site = model.encoder.layer[0].attention.output.dropout
    h = torch.randn(2, 5, tiny.WIDTH)
    with torch.no_grad(), using(model, {"support-de": 0.4, "support-fr": -2}):
        got = site(h)
    changes = [getattr(site, f"adapter_{name}").change(h) for name in NAMES[:2]]
    torch.testing.assert_close(got, h + 0.4 * changes[0] - 2 * changes[1])
    key = model.encoder.layer[0].attention.self.key
    plain = key(h)
    with torch.no_grad(), using(model, {"sales": 0.5}):
        got = key(h)
    torch.testing.assert_close(got, plain * (1 + 0.5 * (key.get_submodule("ia3_sales").scale.flatten() - 1)))
    assert not any(graft.active for graft in grafts)


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_averaged(name):
    model = tiny.with_head("bert") if name in ("own", "replaced") else tiny.bare("bert")
    first, second = several(model, HEADS[name])
    batch = tiny.batch(rows=2)
    with using(model, {"support-de": 0.5}):
        half = states(model, batch)
    assert half.shape[1] == first.method.methods[-1].classes
    with using(model, {"support-de": 3.0, "support-fr": 1.0}):
        got = states(model, batch)
    with using(model, {"support-de": 3.0, "support-fr": 1.0}):
        assert torch.equal(got, states(model, batch))
    if name == "replaced":
        with using(model, {"support-de": 3.0, "support-fr": 1.0}):
            heads = [graft.put_away.modules["classifier"].weight for graft in (first, second)]
            torch.testing.assert_close(model.classifier.weight, 0.75 * heads[0] + 0.25 * heads[1])
            assert model.num_labels == 5
        assert model.num_labels == tiny.CLASSES
    if name in ("mean", "attention", "replaced"):
        assert "add up to 0" in refusal(model, {"support-de": 1.0, "support-fr": -1.0})


@pytest.mark.parametrize("kind", ["packed", "experts"])
def test_weights_that_stand_in_can_be_weighted_but_not_mixed_by_rows(kind):
    found = zoo.BY_NAME["transformer" if kind == "packed" else "mixtral"]
    selection = "q" if kind == "packed" else "experts"
    model = found.fresh()
    grafts = several(model, (f"lora(rank=2, sites='{selection}')", f"lora(rank=3, sites='{selection}')"))
    batch = found.batch()
    changes = []
    base = tiny.snapshot(model)
    for graft in grafts:
        graft.fold()
        changes.append({n: p.detach() - base[n] for n, p in model.named_parameters() if n in base})
        graft.disable()
    with using(model, {"support-de": 0.5, "support-fr": 2.0}):
        got = zoo.outputs(model, batch)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(0.5 * changes[0][n] + 2 * changes[1][n])
    assert tiny.relative(got, zoo.outputs(model, batch)) < 1e-5
    message = refusal(model, rows=["support-de", "support-fr"])
    assert "lora() of the graft 'support-de'" in message or "batch_first" in message
