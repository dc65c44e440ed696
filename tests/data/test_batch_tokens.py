"""Batches of a number of tokens instead of rows: what is in them, how many there are, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import graft_tensors, tune_words

from graftkit.data.by_tokens import ByTokens, check_tokens, order_of, prediction_batches, rounded_up, steps_of
from graftkit.data.order import epoch_batches, padding_share
from graftkit.data.source import Source
from graftkit.errors import UserError
from graftkit.recipe import schema as recipes


class Rows(Source):
    def __init__(self, lengths, uniform=False):
        self.lengths, self.uniform = lengths, uniform

    def __len__(self):
        return len(self.lengths)


def settings(**given):
    return SimpleNamespace(**{"batch_size": 32, "batch_tokens": None, "seed": 3, **given})


@pytest.fixture
def lengths():
    return np.random.default_rng(0).geometric(0.02, 3000) + 3


def test_every_row_is_in_one_batch_and_none_is_too_large(lengths):
    most = int(lengths.max()) + 100
    for epoch in range(3):
        order = ByTokens(lengths, most, 3, epoch)
        batches = order.batches(0, len(order))
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(len(lengths)))
        assert max(len(batch) * lengths[batch].max() for batch in batches) <= most
        assert len(batches) == steps_of(Rows(lengths), settings(batch_tokens=most), 1)
        full = sum(len(batch) * lengths[batch].max() for batch in batches) / (len(batches) * most)
        assert full > 0.85 and padding_share(lengths, batches) < 0.07


def test_epochs_differ_and_a_part_of_one_can_be_asked_for(lengths):
    first, again, other = (ByTokens(lengths, 4000, 3, epoch) for epoch in (0, 0, 1))
    for one, two in zip(first.batches(5, 9), again.batches(0, len(again))[5:9], strict=True):
        np.testing.assert_array_equal(one, two)
    sets = [{frozenset(batch.tolist()) for batch in order.batches(0, len(order))} for order in (first, other)]
    assert len(sets[0] & sets[1]) < len(sets[0]) / 10


def test_lengths_are_rounded_up_by_at_most_an_eighth():
    sizes = np.arange(1, 5000)
    rounded = rounded_up(sizes)
    assert (rounded >= sizes).all() and (rounded < sizes * 1.125).all() and rounded.max() == 4999
    np.testing.assert_array_equal(rounded_up(np.arange(1, 32)), np.arange(1, 32))
    assert (np.diff(rounded) >= 0).all()


def test_without_tokens_the_order_is_what_it_was(lengths):
    order = order_of(Rows(lengths), settings(), 2)
    for one, two in zip(order.batches(0, len(order)), epoch_batches(lengths, 32, 3, 2), strict=True):
        np.testing.assert_array_equal(one, two)


def test_rows_of_one_length_are_divided(lengths):
    source = Rows(np.full(70, 128), uniform=True)
    order = order_of(source, settings(batch_tokens=1000), 0)
    assert [len(batch) for batch in order.batches(0, len(order))] == [7] * 10
    assert steps_of(source, settings(batch_tokens=1000), 4) == 3


def test_predictions_count_tokens_too():
    lengths = np.array([5, 40, 0, 12, 11])
    batches = prediction_batches(lengths, 2, 48)
    assert [batch.tolist() for batch in batches] == [[1], [3, 4, 0, 2]]
    assert len(prediction_batches(np.array([], dtype=np.int64), 2, 48)) == 0


def test_what_is_refused(lengths):
    with pytest.raises(
        UserError, match=r"batch_tokens=60 is less than the \d+ tokens of the longest row \(row \d+\)"
    ):
        check_tokens(Rows(lengths), 60)
    images = Rows(np.ones(9, np.int64), uniform=True)
    images.unit = "images"
    with pytest.raises(UserError, match="rows of this task are images; use"):
        check_tokens(images, 60)
    values = {"model": "m", "data": {"train": "t.csv"}, "train": {"batch_tokens": 512, "batch_size": 8}}
    with pytest.raises(UserError, match="leave out one of the two"):
        recipes.make(values)


def test_a_recipe_with_tokens_is_read_back():
    made = recipes.make({"model": "m", "data": {"train": "t.csv"}, "train": {"batch_tokens": 512}})
    values = yaml.safe_load(made.dump())
    assert values["train"]["batch_tokens"] == 512 and "batch_size" not in values["train"]
    assert recipes.make(values) == made
    plain = recipes.make({"model": "m", "data": {"train": "t.csv"}})
    assert yaml.safe_load(plain.dump())["train"]["batch_size"] == 32


def words(model, rows, out, *more):
    given = [word for word in tune_words(model, rows, out, *more) if not word.startswith("train.batch_size")]
    return [*given, "train.batch_tokens=120", "train.epochs=2", "train.checkpoint_every=1"]


def steps(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit_and_evaluates_as_it_did(
    tmp_path, tiny_bert, rows_folder, command, monkeypatch
):
    from graftkit.engine.loop import Loop

    assert command(*words(tiny_bert, rows_folder, tmp_path / "whole")).status == 0
    plain = Loop._take_step

    def stopping(self, work, *given):
        if self.step == 5:
            raise KeyboardInterrupt
        return plain(self, work, *given)

    monkeypatch.setattr(Loop, "_take_step", stopping)
    assert command(*words(tiny_bert, rows_folder, tmp_path / "torn")).status == 130
    monkeypatch.setattr(Loop, "_take_step", plain)
    assert command("tune", "--resume", tmp_path / "torn").status == 0
    ours, theirs = graft_tensors(tmp_path / "torn"), graft_tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    plan = json.loads((tmp_path / "whole" / "plan.json").read_text())
    taken = steps(tmp_path / "whole")
    assert len(taken) == plan["steps"] == 2 * plan["steps_per_epoch"] and plan["batch_tokens"] == 120
    assert sum(step["rows"] for step in taken) == 2 * 96
    found = command("evaluate", tmp_path / "whole", "--data", rows_folder / "eval.csv", "--json")
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert json.loads(found.out)["metrics"]["loss"] == result["metrics"]["loss"]


@pytest.mark.slow
def test_a_row_that_is_longer_is_refused_before_training(tmp_path, tiny_bert, rows_folder, command):
    done = command(*words(tiny_bert, rows_folder, tmp_path / "run"), "train.batch_tokens=8")
    assert done.status == 1 and "tokens of the longest row" in done.err
