"""Passes of a trial leave no trace, and what they are read as."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import make_rows
from torch import nn

from graftkit.engine.trial import MOST_BUFFERS, Trial, undisturbed
from graftkit.plan.measured import Batches, Kind, Measured, interpolated
from graftkit.recipe import schema as recipes
from graftkit.runs.foresight import encoded
from graftkit.runs.prepare import prepare, prepare_rows
from graftkit.runs.trial import Tried


class Restless(nn.Module):
    """Changes whatever it has when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.calls = nn.Linear(3, 3), nn.BatchNorm1d(3), 0
        self.register_buffer("replaced", torch.randn(2))

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.norm(self.layer(x * torch.rand(()) + np.random.rand() + random.random()))


def states():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def same(one, other) -> bool:
    return torch.equal(one[0], other[0]) and np.array_equal(one[1], other[1]) and one[2] == other[2]


def test_a_pass_leaves_no_trace():
    model, before = Restless(), states()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with undisturbed(model, torch.device("cpu")):
        model.eval().train()(torch.randn(4, 3)).sum().backward()
        model.eval()
        assert not same(states(), before) and not torch.equal(model.replaced, kept["replaced"])
    assert same(states(), before) and model.training and model.norm.training and model.calls == 0
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_buffers_that_cannot_be_copied_are_refused():
    model = nn.Module()
    model.register_buffer("huge", torch.empty(int(MOST_BUFFERS)).expand(2, -1))
    with pytest.raises(ValueError, match="buffers take"), undisturbed(model, torch.device("cpu")):
        pass


@pytest.fixture
def prepared_run(tiny_bert):
    def make(method):
        rows = {name: [row[name] for row in make_rows(48)] for name in ("text", "label")}
        train = {"epochs": 2.0, "batch_size": 8}
        recipe = recipes.make(
            {"model": str(tiny_bert), "data": {"train": "rows"}, "train": train, "method": method}
        )
        return encoded(prepare(recipe, prepare_rows(recipe, rows)))

    return make


@pytest.mark.parametrize("method", ["lora() + head()", "head()"])
def test_a_trial_changes_nothing(prepared_run, method):
    """Nor does it train what the run does not, with its cache or without."""
    prepared, datasets = prepared_run(method)
    model = prepared.graft.model
    kept = {n: (t.clone(), t.requires_grad) for n, t in (*model.named_parameters(), *model.named_buffers())}
    modes = [module.training for module in model.modules()]
    before = states()
    found = Tried(prepared, datasets).measured()
    assert same(states(), before) and modes == [module.training for module in model.modules()]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(kept[name][0], tensor) and kept[name][1] == tensor.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(seconds > 0 for _, seconds in (*found.step.warm, *found.step.cold))
    assert (found.filling is not None) == (method == "head()") and found.update > 0
    assert found.flops["products"] > 0 and sum(found.time.values()) > 0
    assert Measured.of(found.as_dict()) == found


def test_gradients_of_a_trial_are_those_of_the_run(prepared_run):
    """The first step of the run, and the batch of the trial that it consists of."""
    prepared, _ = prepared_run("lora() + head()")
    from graftkit.engine.forward import Forward
    from graftkit.engine.loop import Loop

    parts = prepared.graft, prepared.train, Forward(prepared.graft, prepared.device, prepared.precision)
    more = prepared.learn, prepared.settings
    trial, loop = Trial(*parts, prepared.phases[-1], *more), Loop(*parts, prepared.phases, *more)
    found: list[dict[str, torch.Tensor]] = []

    def kept(one, make):
        def gradients(work):
            sums = make(work)
            found.append({n: p.grad.clone() for n, p in one.parameters.items() if p.grad is not None})
            return sums

        return gradients

    trial._gradients = kept(trial, trial._gradients)
    loop._gradients = kept(loop, loop._gradients)
    with trial.entered():
        trial.batch(loop.batches(0)[0], 1.0)
    next(iter(loop))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 4
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())
    assert any(gradient.any() for gradient in found[0].values())


def test_seconds_between_and_beyond_measured_batches():
    points = [(10.0, 1.0), (20.0, 3.0), (20.0, 5.0)]
    assert interpolated(points, np.array([5.0, 15.0, 40.0])).tolist() == [0.5, 2.5, 8.0]


def test_new_shapes_cost_their_kernels():
    """Shapes a b c a, of which two are kept: the last one is compiled again."""
    batches = Batches(np.full(4, 10.0), np.array([1, 2, 3, 1]))
    assert batches.new(2).tolist() == [True] * 4 and batches.new(3).tolist() == [True, True, True, False]
    kind = Kind([(10.0, 1.0)], [(10.0, 1.5)], 0, 0)
    assert kind.seconds(batches, 2) == 4 + 4 * 0.5 and kind.seconds(batches, 9) == 4 + 3 * 0.5
