"""Weights in bf16 with stochastic rounding: right in the mean, and a function of (seed, step, parameter)."""

from __future__ import annotations

import pytest
import torch
from conftest import equal_bits, graft_tensors, tune_words
from killing import stopped_at
from torch import nn

from graftkit import AdamW
from graftkit.engine.rounding import Rounding
from graftkit.engine.updates import AfterBackward, Alone, WithinBackward

pytestmark = pytest.mark.slow


def test_the_mean_of_many_roundings_is_the_value():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(40, generator=draw) * 10 ** torch.linspace(-6, 6, 40)
    rounding, count = Rounding(3), 4000
    found = torch.stack([rounding(values, step, 0).double() for step in range(count)])
    below = (values.view(torch.int32) & -(1 << 16)).view(torch.float32).double()
    above = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32).double()
    assert ((found == below) | (found == above)).all() and len(set(found[:, 5].tolist())) == 2
    gap = (above - below).abs()
    # the standard deviation of the mean is at most gap / 2 / sqrt(count)
    assert ((found.mean(0) - values.double()).abs() < 4 * gap / 2 / count**0.5).all()


def test_values_that_bf16_has_stay_and_the_numbers_are_those_of_seed_step_and_parameter():
    exact = torch.randn(100, generator=torch.Generator().manual_seed(1)).bfloat16()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 2.0**127])
    rounding = Rounding(0)
    assert torch.equal(rounding(exact.float(), 0, 0), exact)
    assert torch.equal(rounding(special, 0, 0)[:4].float(), special[:4])
    assert rounding(torch.tensor([float("nan")] * 50), 0, 0).isnan().all()
    values = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    one = rounding(values, 5, 7)
    assert torch.equal(one, Rounding(0)(values, 5, 7)) and one.shape == values.shape
    for other in (Rounding(1)(values, 5, 7), rounding(values, 6, 7), rounding(values, 5, 8)):
        share = (other != one).float().mean()
        assert 0.2 < share < 0.45, (
            "two independent roundings differ with probability 2 p (1 - p), a third in the mean"
        )


def test_pieces_are_rounded_apart_and_together(monkeypatch):
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr("graftkit.engine.rounding.PIECE", 8)
    found = Rounding(0)(values.T, 0, 0)  # not contiguous
    assert found.shape == (7, 5) and (found.float() - values.T).abs().max() < 0.02


@pytest.mark.parametrize("kind", [AfterBackward, WithinBackward])
def test_small_updates_add_up(kind):
    """Each is less than a twentieth of what nearest rounding keeps; the state is that of fp32."""
    weight = nn.Parameter(torch.ones(400, dtype=torch.bfloat16))
    whole = nn.Parameter(torch.ones(3))
    members = [{"params": [weight, whole], "lr": 8e-5, "weight_decay": 0.0}]
    optimizer = AdamW().make(members)
    updates = kind(optimizer, 0.0, Rounding(0))
    updates.enter({"weight": weight, "whole": whole})
    for step in range(100):
        updates.begin(step, None)
        updates.backward(weight.float().sum() + whole.sum())
        updates.step(float(updates.norm()))
        optimizer.zero_grad()
    assert weight.dtype == torch.bfloat16 and optimizer.state[weight]["exp_avg"].dtype == torch.float32
    wanted = 1 - 100 * 8e-5  # Adam's steps are its rate; here 2 units of bf16 below 1
    assert float(whole.detach().mean()) == pytest.approx(wanted, abs=1e-5)
    assert float(weight.detach().float().mean()) == pytest.approx(wanted, abs=4e-4)
    assert float((torch.ones(1).bfloat16() - 8e-5).float()) == 1.0


def test_one_parameter_at_a_time_is_in_fp32():
    weights = [nn.Parameter(torch.randn(8, 4).bfloat16()) for _ in range(3)]
    optimizer = torch.optim.SGD(weights, lr=0.5)
    plain, seen = optimizer.step, []

    def step(*given):
        seen.append([w.dtype for w in weights])
        return plain(*given)

    optimizer.step = step
    alone = Alone(optimizer, Rounding(0))
    alone.begin(0)
    for weight in weights:
        weight.grad = torch.randn(8, 4).bfloat16()
        before, gradient = weight.detach().float(), weight.grad.float()
        alone.step(weight)
        assert weight.grad is None
        assert (weight.detach().float() - (before - 0.5 * gradient)).abs().max() < 0.05
    assert all(types.count(torch.float32) == 1 for types in seen) and len(seen) == 3


METHOD = "full(lr=0.001) + head(pooling='own')"


@pytest.mark.parametrize("within", [False, True])
def test_a_run_holds_what_is_planned(ready, within):
    run = ready(METHOD, precision="auto", weight_type="bf16", step_in_backward=within, steps=3, ema=0.9)
    plan, model = run.prepared.plan, run.graft.model
    before = {name: p.detach().clone() for name, p in run.graft.parameters.items()}
    types = {name: p.dtype for name, p in run.graft.parameters.items()}
    for name, group in run.graft.labels.items():
        rounded = group.role == "base" and before[name].dim() > 1
        assert types[name] == (torch.bfloat16 if rounded else torch.float32), name
    steps = list(run.loop)
    assert all(torch.isfinite(torch.tensor([step.loss, step.gradient_norm])).all() for step in steps)
    assert types == {name: p.dtype for name, p in run.graft.parameters.items()}
    assert all(
        not torch.equal(p, before[n]) for n, p in run.graft.parameters.items() if n.endswith("query.weight")
    )
    held = [*model.parameters(), *model.buffers()]
    assert plan.weight_bytes == sum(t.numel() * t.element_size() for t in held)
    assert plan.optimizer_bytes == run.loop.optimizer_bytes
    averages = run.loop.average.values.values()
    assert plan.ema_bytes == sum(t.numel() * t.element_size() for t in averages)
    sizes = {name: p.numel() * p.element_size() for name, p in run.graft.parameters.items()}
    if within:
        layers: dict[str, int] = {}
        for name, size in sizes.items():
            layers[name.rpartition(".")[0]] = layers.get(name.rpartition(".")[0], 0) + size
        assert plan.gradient_bytes == max(layers.values())
    else:
        assert plan.gradient_bytes == sum(sizes.values())


def test_both_ways_to_step_give_the_same_weights(ready):
    found = []
    for within in (False, True):
        run = ready(METHOD, precision="bf16", weight_type="bf16", step_in_backward=within, clip=0, steps=3)
        losses = [step.loss for step in run.loop]
        found.append((losses, {name: p.detach() for name, p in run.graft.parameters.items()}))
    assert found[0][0] == found[1][0] and equal_bits(found[0][1], found[1][1])


@pytest.mark.slow
def test_a_run_that_is_interrupted_rounds_the_same(command, tiny_bert, rows_folder, tmp_path, monkeypatch):
    def words(name: str) -> list[str]:
        more = (
            "train.precision=bf16",
            "train.weight_type=bf16",
            "train.steps=5",
            "train.checkpoint_every=1",
            "train.ema=0.9",
        )
        return tune_words(tiny_bert, rows_folder, tmp_path / name, *more, method=METHOD)

    assert command(*words("whole")).status == 0
    stopped_at(3, words("parts"), command, monkeypatch)
    assert command("tune", "--resume", tmp_path / "parts").status == 0
    assert equal_bits(graft_tensors(tmp_path / "parts"), graft_tensors(tmp_path / "whole"))


def test_what_does_not_go_together_is_refused(command):
    done = command(
        "tune", "--model", "m", "--train", "t.csv", "train.weight_type=bf16", "train.precision=fp32"
    )
    assert done.status == 1 and "train.weight_type=bf16 computes in bf16 too" in done.err


def test_gradients_in_bf16_are_clipped_by_a_norm_in_fp32():
    draw = torch.Generator().manual_seed(0)
    weights = {str(i): nn.Parameter(torch.randn(50, 30, generator=draw).bfloat16()) for i in range(3)}
    updates = AfterBackward(torch.optim.SGD(list(weights.values()), lr=0.1), 0.5, Rounding(0))
    updates.enter(weights)
    updates.begin(0, None)
    updates.backward(sum((w * w.detach()).sum() for w in weights.values()))
    wanted = torch.cat([w.grad.double().flatten() for w in weights.values()]).norm()
    assert float(updates.norm()) == pytest.approx(float(wanted), rel=1e-5)
    clipped = torch.cat([w.grad.double().flatten() for w in weights.values()]).norm()
    assert float(clipped) == pytest.approx(0.5, rel=1e-2)
