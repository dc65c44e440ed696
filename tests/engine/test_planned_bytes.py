"""The plan's bytes of gradients and optimizer state against what a run allocates."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tune_words
from torch import nn

from graftkit import attach
from graftkit.backbone import Backbone
from graftkit.optim.base import as_optimizer
from graftkit.plan.memory import gradient_bytes, optimizer_bytes
from graftkit.recipe.catalogue import entries

pytestmark = pytest.mark.slow

OPTIONS = dict.fromkeys(("galore", "fira", "apollo"), "rank=3, interval=2") | {"badam": "interval=2"}
EXPRESSIONS = [f"{name}({OPTIONS.get(name, '')})" for name in entries("optimizer")]
METHOD = "full(lr=0.001) + head(pooling='own')"


@pytest.mark.parametrize("optimizer", EXPRESSIONS)
def test_optimizer_bytes_are_those_that_a_run_allocates(ready, optimizer):
    run = ready(METHOD, optimizer=optimizer, steps=2)
    list(run.loop)
    assert run.prepared.plan.optimizer_bytes == run.loop.optimizer_bytes > 0


def test_no_more_gradients_exist_at_once_than_the_plan_counts(ready):
    run = ready(METHOD, steps=2, step_in_backward=True)
    planned = run.prepared.plan.gradient_bytes
    own = [sum(4 * p.numel() for p in m.parameters(recurse=False)) for m in run.graft.model.modules()]
    assert planned == max(own) < sum(own) / 5
    plain, seen = run.loop.optimizer.step, []

    def step(*given):
        live = [p.grad for p in run.graft.model.parameters() if p.grad is not None]
        seen.append(sum(g.numel() * g.element_size() for g in live))
        return plain(*given)

    run.loop.optimizer.step = step
    list(run.loop)
    assert planned / 2 < max(seen) <= planned


def test_a_tied_weight_waits_beside_the_others():
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 11, bias=False))
    model[3].weight = model[0].weight
    graft = attach(Backbone(model), "full()")
    assert gradient_bytes(graft, graft.labels) == 4 * (44 + 30 + 28)
    assert gradient_bytes(graft, graft.labels, step_in_backward=True) == 4 * (44 + 30)
    some = {name: group for name, group in graft.labels.items() if name.startswith("2.")}
    assert gradient_bytes(graft, some, step_in_backward=True) == 4 * 28
    assert optimizer_bytes(graft, as_optimizer("adamw()"), some) == 8 * 28 + 2 * torch.float32.itemsize


@pytest.mark.slow
def test_plan_and_result_hold_them(command, tiny_bert, rows_folder, tmp_path):
    words = tune_words(
        tiny_bert, rows_folder, tmp_path / "run", "train.steps=2", "--json", "train.optimizer=galore(rank=3)",
        method=METHOD,
    )  # fmt: skip
    whole = json.loads(command("plan", *words[1:]).out)
    planned = json.loads(command("plan", *words[1:], "train.step_in_backward=true").out)
    assert planned["gradient_bytes"] < whole["gradient_bytes"] / 10
    assert planned["optimizer_bytes"] == whole["optimizer_bytes"]
    done = json.loads(command(*words, "train.step_in_backward=true").out)
    assert done["optimizer_bytes"] == planned["optimizer_bytes"]
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert all(written[name] == planned[name] for name in ("gradient_bytes", "optimizer_bytes"))
    assert (
        json.loads((tmp_path / "run" / "result.json").read_text())["optimizer_bytes"]
        == done["optimizer_bytes"]
    )
