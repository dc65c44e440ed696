"""Figures that are read from the device every few steps: the same run, and no step after one that is not finite."""

from __future__ import annotations

import pytest
import torch
from conftest import equal_bits

from graftkit.engine.loop import NotFinite

pytestmark = pytest.mark.slow


def values(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.graft.parameters.items()}


def state(run) -> dict[str, torch.Tensor]:
    held = run.loop.optimizer.state
    return {
        f"{name}/{key}": torch.as_tensor(value).clone()
        for name, p in run.graft.parameters.items()
        for key, value in held[p].items()
    }


@pytest.mark.parametrize("method", ["lora(rank=2) + head()", "adalora(rank=2, target_rank=1) + head()"])
def test_steps_read_together_are_those_read_one_by_one(ready, method):
    runs = [ready(method, steps=9) for _ in range(2)]
    runs[1].loop.together = 4
    known: list[bool] = []
    steps: list[list] = [list(runs[0].loop), []]
    for step in runs[1].loop:
        known.append(step.known)
        steps[1].append(step)
    late = "adalora" not in method  # it changes more than its optimizer does
    assert known == ([True] * 2 + [False, False, False, True] + [False, False, True] if late else [True] * 9)
    assert [s.loss for s in steps[0]] == [s.loss for s in steps[1]]
    assert [s.gradient_norm for s in steps[0]] == [s.gradient_norm for s in steps[1]]
    assert [s.accuracy for s in steps[0]] == [s.accuracy for s in steps[1]]
    assert equal_bits(values(runs[0]), values(runs[1])) and equal_bits(state(runs[0]), state(runs[1]))


def test_asking_for_one_loss_reads_all_that_wait(ready):
    run = ready("lora(rank=2) + head()", steps=9)
    run.loop.together = 100
    taken = []
    for step in run.loop:
        taken.append(step)
        if len(taken) == 6:
            assert [s.known for s in taken] == [True] * 2 + [False] * 4
            assert taken[3].loss > 0
            assert all(s.known for s in taken)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_no_step_changes_anything_after_one_that_is_not_finite(ready, where):
    run = ready("lora(rank=2) + head()", steps=9)
    run.loop.together = 4
    plain = run.loop.learn

    def learn(forward, batch):
        terms = plain(forward, batch)
        if run.loop.step == 4:
            if where == "loss":
                terms["loss"].losses.data[1] = float("nan")
            elif torch.is_grad_enabled():
                terms["loss"].losses.register_hook(lambda gradient: gradient * float("inf"))
        return terms

    run.loop.learn = learn
    before, steps = None, []
    with pytest.raises(NotFinite, match="in step 5, so the weights were not changed"):
        for step in run.loop:
            steps.append(step)
            if len(steps) == 4:
                before = values(run), state(run)
    assert len(steps) == 5 and run.loop.step == 4, "read after step 6, in which step 5 is found"
    assert before is not None and equal_bits(before[0], values(run)) and equal_bits(before[1], state(run))
