"""train.lr=find: the range test leaves no trace in the run, which is the one with the number it finds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import equal_bits, graft_tensors, tune_words

from graftkit.engine.range_test import choose, range_test
from graftkit.errors import UserError

pytestmark = pytest.mark.slow


def test_the_choice_on_a_known_curve():
    """A logistic descent is steepest at its middle, 1e-3; its minimum is at 3e-2, so a tenth of that is not in the way."""
    rates = np.geomspace(1e-6, 1, 100)
    at = np.log10(rates)
    loss = 2 - 1.5 / (1 + np.exp(-(at + 3) * 4)) + 3 * np.clip(at + 1.5, 0, None) ** 2
    assert choose(rates, loss) == pytest.approx(1e-3, rel=0.2)
    early = 2 - 1.5 / (1 + np.exp(-(at + 3) * 4)) + 3 * np.clip(at + 2.6, 0, None) ** 2
    lowest = rates[early.argmin()]
    assert choose(rates, early) == pytest.approx(min(1e-3, lowest / 10), rel=0.05)
    noisy = loss + 0.3 * np.sin(np.arange(100)) * (at < -5)  # a plateau's slopes are no descent
    assert choose(rates, noisy) == pytest.approx(1e-3, rel=0.2)
    with pytest.raises(UserError, match="did not fall at any rate"):
        choose(rates, np.linspace(1, 2, 100))


def test_it_restores_everything_and_uses_no_randomness(ready):
    run = ready("adalora(rank=4, target_rank=2) + head(lr=0.02)", steps=40)
    before = {name: tensor.detach().clone() for name, tensor in run.graft.state.items()}
    frozen = {name: p.detach().clone() for name, p in run.graft.model.named_parameters()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    prepared = run.prepared
    curve = range_test(
        run.graft, run.dataset, run.forward, prepared.phases, prepared.learn, prepared.settings
    )
    assert equal_bits(before, run.graft.state) and torch.equal(random, torch.get_rng_state())
    now = dict(run.graft.model.named_parameters())
    assert equal_bits(frozen, now) and all(p.grad is None for p in now.values())
    assert all(now[name].requires_grad for name in run.graft.labels)
    assert len(curve.rates) == len(curve.losses) <= 40 and all(map(math.isfinite, curve.losses))
    assert 1e-6 < curve.chosen < 1 and curve.rates[0] == 1e-6


def test_a_run_is_the_one_with_the_number_that_it_finds(command, tiny_bert, rows_folder, tmp_path):
    def words(name: str, lr: str) -> list[str]:
        given = tune_words(
            tiny_bert, rows_folder, tmp_path / name, "train.steps=20", method="bitfit() + head()"
        )
        return [word for word in given if not word.startswith("train.lr")] + [f"train.lr={lr}"]

    planned = command("plan", *[word for word in words("x", "find")[1:]])
    assert planned.status == 0 and "found by a range test" in planned.out
    done = command(*words("found", "find"))
    assert done.status == 0, done.err
    curve = json.loads((tmp_path / "found" / "lr-find.json").read_text())
    assert f"chosen: {curve['chosen']:g}" in done.out
    assert f"lr: {curve['chosen']}" in (tmp_path / "found" / "recipe.yaml").read_text()
    assert command(*words("given", str(curve["chosen"]))).status == 0
    assert equal_bits(graft_tensors(tmp_path / "found"), graft_tensors(tmp_path / "given"))


def test_what_cannot_be_searched_is_refused(ready):
    for method, train, told in (
        ("gradual_unfreeze()", {"steps": 40}, "trains only some of its parameters"),
        ("lora()", {"steps": 4}, "at least 12 steps"),
        ("lora(lr=1e-3) + head(lr=0.01)", {"steps": 40}, "sets its own lr"),
    ):
        with pytest.raises(UserError, match=told):
            ready(method, **train, lr="find")
    with pytest.raises(UserError, match="'find'"):
        ready("lora()", lr=0)
