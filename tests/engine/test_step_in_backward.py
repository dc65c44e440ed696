"""train.step_in_backward: the ordinary step to the last bit, with one gradient at a time."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import equal_bits, graft_tensors, tune_words
from killing import stopped_at
from torch import nn

from graftkit import AdamW, UserError
from graftkit.engine.loop import NotFinite
from graftkit.engine.updates import AfterBackward, Alone, WithinBackward
from graftkit.optim.base import as_optimizer
from graftkit.recipe.catalogue import entries

pytestmark = pytest.mark.slow

ABLE = [name for name, entry in entries("optimizer").items() if entry.constants.get("steps_in_backward")]
OPTIONS = dict.fromkeys(("galore", "fira", "apollo"), "rank=3, interval=2") | {"badam": "interval=2"}
EXPRESSIONS = [f"{name}({OPTIONS.get(name, '')})" for name in ABLE]
METHOD = "full(lr=0.001) + head()"


def trained(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.graft.parameters.items()}


def state_of(run) -> dict[str, torch.Tensor]:
    """Tensors of the optimizer's state, by name."""
    return {
        f"{key}/{name}": torch.as_tensor(value)
        for name, parameter in run.graft.parameters.items()
        for key, value in run.loop.optimizer.state.get(parameter, {}).items()
    }


@pytest.mark.parametrize("optimizer", EXPRESSIONS)
def test_losses_weights_and_states_are_those_of_the_ordinary_step(ready, optimizer):
    runs = [ready(METHOD, optimizer=optimizer, clip=0, steps=4, step_in_backward=on) for on in (False, True)]
    ordinary, within = (list(run.loop) for run in runs)
    assert [step.loss for step in ordinary] == [step.loss for step in within]
    assert equal_bits(*map(trained, runs)) and equal_bits(*map(state_of, runs))
    norms = [[step.gradient_norm for step in steps] for steps in (ordinary, within)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and min(norms[1]) > 0
    groups = [run.loop.optimizer.param_groups for run in runs]
    assert [{**g, "params": 0} for g in groups[0]] == [{**g, "params": 0} for g in groups[1]]


def test_at_most_one_gradient_exists_at_a_time(ready):
    run = ready("full() + head()", steps=3, step_in_backward=True)
    found = []
    plain = run.loop.optimizer.step

    def step(*given):
        found.append(sum(p.grad is not None for p in run.graft.model.parameters()))
        return plain(*given)

    run.loop.optimizer.step = step
    assert len(list(run.loop)) == 3
    used = [name for name, p in run.graft.parameters.items() if run.loop.optimizer.state.get(p)]
    assert set(found) == {1} and len(found) == 3 * len(used) > 100
    assert all(p.grad is None for p in run.graft.model.parameters())
    hooks = [p._post_accumulate_grad_hooks for p in run.graft.parameters.values()]
    assert not any(hooks), "the loop takes its hooks away"


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("gradual_unfreeze() + head()", {"epochs": 4.0, "steps": None}),
        ("lora(rank=2) + head()", {}),
        ("unfreeze('blocks[-1:]') + head()", {}),
    ],
)
def test_other_methods_and_phases_too(ready, method, more):
    runs = [ready(method, clip=0, step_in_backward=on, **more) for on in (False, True)]
    assert [s.loss for s in runs[0].loop] == [s.loss for s in runs[1].loop]
    assert equal_bits(*map(trained, runs)) and equal_bits(*map(state_of, runs))
    assert len(runs[0].prepared.phases) == len(runs[1].prepared.phases)


def test_an_extra_loss_is_part_of_the_one_backward_pass(ready, monkeypatch):
    """The gradient of the sum is that of both, whichever is computed first."""
    found = []
    for on in (False, True):
        run = ready("lora(rank=2) + head()", clip=0, step_in_backward=on, steps=1, optimizer="adamw(eps=1.0)")
        monkeypatch.setattr(
            run.graft,
            "extra_loss",
            lambda run=run: sum(p.square().sum() for p in run.graft.parameters.values()),
        )
        (step,) = run.loop
        found.append((step.gradient_norm, trained(run)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][0] > 1
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name])


class Tied(nn.Module):
    """One matrix that is read twice, before and after another."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.outer = nn.Parameter(torch.randn(5, 5, generator=draw))
        self.inner = nn.Parameter(torch.randn(5, 5, generator=draw))

    def forward(self, x):
        return ((x @ self.outer).tanh() @ self.inner).tanh() @ self.outer.T


def made(clip: float):
    model = Tied()
    groups = [{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.1}]
    return model, AdamW().make(groups), clip


def test_a_tied_weight_takes_one_step_with_the_sum_of_its_gradients():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    found = []
    for kind in (AfterBackward, WithinBackward):
        model, optimizer, clip = made(0.0)
        updates = kind(optimizer, clip)
        updates.enter(dict(model.named_parameters()))
        for step in range(3):
            updates.begin(step, None)
            updates.backward(model(x).square().mean())
            updates.step(float(updates.norm()))
            optimizer.zero_grad()
        assert all(optimizer.state[p]["step"] == 3 for p in model.parameters())
        found.append(model.state_dict())
    assert equal_bits(*found)


def test_gradients_are_clipped_by_the_norm_before_and_their_own():
    """Against the formula: SGD with rate 1 shows the gradient that is applied."""
    weights = [nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(s))) for s in (1, 2)]
    updates = WithinBackward(torch.optim.SGD(weights, lr=1.0), clip=0.5)
    updates.enter({"first": weights[0], "second": weights[1]})
    previous = 0.0
    for step, size in enumerate((1.0, 30.0, 0.1, 1e-4)):
        draw = torch.Generator().manual_seed(10 + step)
        gradients = [size * torch.randn(4, 3, generator=draw), 2 * size * torch.randn(4, 3, generator=draw)]
        before = [w.detach().clone() for w in weights]
        updates.begin(step, None)
        updates.backward(sum((w * g).sum() for w, g in zip(weights, gradients)))
        total = float(updates.norm())
        assert total == pytest.approx(math.hypot(*(float(g.norm()) for g in gradients)), rel=1e-5)
        for weight, old, gradient in zip(weights, before, gradients):
            bound = max(previous, float(gradient.norm()))
            wanted = gradient * min(1.0, 0.5 / (bound + 1e-6))
            torch.testing.assert_close(old - weight.detach(), wanted, rtol=1e-4, atol=1e-6)
            assert float(wanted.norm()) <= 0.5
        updates.step(total)
        previous = total


def same_space(gradient, rank, *_):
    """A space that depends on the shape alone, so that it is the same for one batch and for a part of it."""
    draw = torch.Generator().manual_seed(sum(gradient.shape))
    return torch.linalg.qr(torch.randn(min(gradient.shape), rank, generator=draw)).Q


def test_accumulated_projections_take_the_step_of_one_batch_with_all_rows(monkeypatch):
    monkeypatch.setattr("graftkit.optim.galore.singular_space", same_space)
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    found, sizes = [], []
    for parts in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
        groups = [{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.1}]
        updates = WithinBackward(as_optimizer("galore(rank=2)").make(groups), clip=0.0)
        updates.enter(dict(model.named_parameters()))
        for step in range(3):
            updates.begin(step, None)
            for part in range(parts):
                updates.backward(model(x[part::parts]).square().sum() / 12, last=part == parts - 1)
                sizes.append({name: tuple(t.shape) for name, t in updates.sums.items()})
            updates.step(float(updates.norm()))
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)
    assert sizes[3:6] == [{"0.weight": (7, 2), "2.weight": (2, 7)}] * 2 + [{}]


def test_a_parameter_that_the_last_batch_does_not_reach_takes_its_step(monkeypatch):
    monkeypatch.setattr("graftkit.optim.galore.singular_space", same_space)
    weights = [nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(s))) for s in (1, 2)]
    before = [w.detach().clone() for w in weights]
    groups = [{"params": weights, "lr": 0.1, "weight_decay": 0.0}]
    updates = WithinBackward(as_optimizer("galore(rank=2)").make(groups), clip=0.0)
    updates.enter({"first": weights[0], "second": weights[1]})
    updates.begin(0, None)
    updates.backward(weights[0].square().sum() + weights[1].square().sum(), last=False)
    updates.backward(weights[1].square().sum())
    updates.step(float(updates.norm()))
    assert not any(torch.equal(a, b.detach()) for a, b in zip(before, weights))
    assert all(w.grad is None for w in weights) and not updates.sums


def test_a_loss_that_is_not_finite_ends_the_step_for_all_its_batches():
    weight = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    before = weight.detach().clone()
    groups = [{"params": [weight], "lr": 0.1, "weight_decay": 0.0}]
    updates = WithinBackward(as_optimizer("galore(rank=2)").make(groups), clip=1.0)
    updates.enter({"weight": weight})
    updates.begin(0, None)
    for loss, last in ((weight.sum(), False), (weight.sum() * math.nan, False), (weight.sum(), True)):
        updates.backward(loss, last)
    assert torch.equal(weight.detach(), before) and float(updates.norm()) == 0


def test_a_run_that_accumulates_projections_is_the_ordinary_one_to_rounding(ready, monkeypatch):
    """And no more gradients and sums exist at once than the plan counts."""
    monkeypatch.setattr("graftkit.optim.galore.singular_space", same_space)
    more = {"optimizer": "galore(rank=3)", "clip": 0, "steps": 2, "batch_size": 6, "accumulate": 3}
    ordinary = ready(METHOD, **more)
    losses = [step.loss for step in ordinary.loop]
    run = ready(METHOD, **more, step_in_backward=True)
    updates, seen = run.loop.updates, []
    plain = updates.alone.project

    def project(parameter):
        live = [p.grad for p in run.graft.model.parameters() if p.grad is not None]
        seen.append(sum(t.numel() * t.element_size() for t in (*live, *updates.sums.values())))
        return plain(parameter)

    monkeypatch.setattr(updates.alone, "project", project)
    assert [step.loss for step in run.loop] == pytest.approx(losses, rel=1e-4)
    for name, value in trained(ordinary).items():
        torch.testing.assert_close(trained(run)[name], value, rtol=1e-3, atol=1e-5)
    planned = run.prepared.plan.gradient_bytes
    assert max(seen) == planned < 0.8 * ordinary.prepared.plan.gradient_bytes


def test_a_loss_that_is_not_finite_changes_nothing(ready, monkeypatch):
    run = ready(METHOD, steps=3, step_in_backward=True)
    steps = iter(run.loop)
    next(steps)
    before, state = trained(run), {k: v.clone() for k, v in state_of(run).items()}
    plain = run.loop._total
    monkeypatch.setattr(run.loop, "_total", lambda *given: plain(*given) * math.nan)
    monkeypatch.setattr("graftkit.engine.sums.Sums.add", _add_nan)
    with pytest.raises(NotFinite, match=r"the loss is nan in step 2, so the weights were not changed"):
        next(steps)
    assert equal_bits(trained(run), before) and equal_bits(state_of(run), state)


def _add_nan(self, terms) -> None:
    for name, term in terms.items():
        self.losses[name] = self.losses[name] + term.losses.detach().sum() * math.nan


def test_a_gradient_that_is_not_finite_is_not_applied_and_stops_the_run(ready):
    run = ready(METHOD, steps=3, step_in_backward=True)
    steps = iter(run.loop)
    next(steps)
    first = next(iter(run.graft.parameters.values()))
    before = trained(run)
    first.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        NotFinite, match=r"the gradient norm is (inf|nan) in step 2, so the run stopped; layers above"
    ):
        next(steps)
    after = trained(run)
    assert all(value.isfinite().all() for value in (*after.values(), *state_of(run).values()))
    assert not equal_bits(before, after) and run.loop.step == 1


def test_memory_that_runs_out_is_an_error_as_half_a_step_cannot_be_repeated(ready, monkeypatch):
    run = ready("lora(rank=2) + head()", steps=1, step_in_backward=True)

    def call(*given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(run.dataset), "call", call)
    with pytest.raises(
        UserError, match=r"cannot be split, as train.step_in_backward .*lower train.batch_size"
    ):
        list(run.loop)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            "train.accumulate=2",
            "adamw() needs all of it for its step, so train.accumulate=2 has nothing to add to",
        ),
        ("method=adalora() + head()", "adalora() reads the gradients of a step after it"),
        (
            "train.optimizer=together()",
            "together() needs more than the gradient of one parameter for its step",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(command, tmp_path, monkeypatch, setting, told):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "together.py").write_text(TOGETHER)
    monkeypatch.setenv("GRAFTKIT_OPTIMIZERS", str(tmp_path / "own"))
    for name in ("plan", "tune"):
        words = ["--model", "m", "--train", "none.csv", "train.step_in_backward=true", setting]
        done = command(name, *words)
        assert done.status == 1 and told in done.err, done.err


TOGETHER = '''"""One step of all."""
from dataclasses import dataclass
from graftkit.optim.base import Optimizer


@dataclass(frozen=True)
class Together(Optimizer):
    """Needs all gradients at once."""
'''


def test_numbers_in_groups_count_steps_not_parameters():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["taken"] = group.get("taken", 0) + 1
            super().step(closure)

    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = Counting(weights, lr=0.1)
    alone = Alone(optimizer)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones(2)
            alone.step(weight)
            weight.grad = None
        alone.finish()
    assert optimizer.param_groups[0]["taken"] == 2 and len(optimizer.param_groups[0]["params"]) == 3
    assert all(torch.allclose(weight, torch.full((2,), 0.8)) for weight in weights)


@pytest.mark.slow
def test_a_run_that_is_interrupted_ends_with_the_same_weights(
    command, tiny_bert, rows_folder, tmp_path, monkeypatch
):
    """The norm that the next step is clipped by is in the checkpoint."""

    def words(name: str) -> list[str]:
        more = ("train.steps=6", "train.step_in_backward=true", "train.clip=0.1", "train.checkpoint_every=1")
        return tune_words(tiny_bert, rows_folder, tmp_path / name, *more, method=METHOD)

    assert command(*words("whole")).status == 0
    stopped_at(3, words("parts"), command, monkeypatch)
    assert command("tune", "--resume", tmp_path / "parts").status == 0
    assert equal_bits(graft_tensors(tmp_path / "parts"), graft_tensors(tmp_path / "whole"))
