"""`train.best`: which figure chooses the weights that a run keeps."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tune_words

from graftkit.engine.checkpoint import load_best, save_best
from graftkit.errors import UserError
from graftkit.recipe.catalogue import entries
from graftkit.runs.best import Best, best_of
from graftkit.runs.prepare import make_task

CLASSIFY = ("single", "multi", "regression", "ordinal")


def test_the_direction_is_that_of_the_figure():
    high, low = {"loss": 0.4, "f1": 0.8, "perplexity": 9.0}, {"loss": 0.3, "f1": 0.7, "perplexity": 8.0}
    assert Best("f1", "max").better(high, low) and not Best("f1", "max").better(low, high)
    assert Best("perplexity", "min").better(low, high) and not Best("perplexity", "min").better(high, low)
    assert Best("f1", "max").better({"f1": 0.8, "loss": 0.3}, high), (
        "the loss decides where the figure is the same"
    )
    assert not Best("f1", "max").better(high, high)
    nan = {"loss": 0.1, "f1": math.nan}
    assert not Best("f1", "max").better(nan, low) and Best("f1", "max").better(low, nan)
    with pytest.raises(UserError, match=r"does not report it \(reported: loss, f1, perplexity\)"):
        Best("macro_f1", "max").better(high, None)


@pytest.mark.parametrize(
    "task",
    [
        *(name for name in entries("task") if name != "classify"),
        *(f"classify(kind={kind!r})" for kind in CLASSIFY),
    ],
)
def test_every_task_says_what_is_better(task):
    figures = make_task(task).figures(("O", "B-x", "I-x"))
    assert set(figures.values()) <= {"max", "min"} and figures["loss"] == "min"
    for name, direction in figures.items():
        errs = any(word in name for word in ("loss", "error", "perplexity", "bits_per_byte"))
        assert direction == ("min" if errs else "max"), name


def test_tags_that_are_no_entities_have_other_figures():
    task = make_task("tag")
    assert next(iter(task.figures(("O", "B-x", "I-x")))) == "f1"
    assert next(iter(task.figures(("NOUN", "VERB")))) == "accuracy"
    with pytest.raises(UserError, match=r"available: accuracy, macro_f1, loss"):
        best_of(task, ("NOUN", "VERB"), "f1")


@pytest.mark.parametrize("figure", ["macro_f1", "loss", None])
@pytest.mark.slow
def test_a_run_keeps_the_weights_that_are_best_by_it(command, short_bert, rows_folder, tmp_path, figure):
    more = [] if figure is None else [f"train.best={figure}"]
    words = tune_words(
        short_bert, rows_folder, tmp_path / "run", "train.steps=12", "train.evaluate_every=1", "train.lr=0.3",
        "train.schedule=constant", "train.early_stopping=4", *more, method="head()",
    )  # fmt: skip
    assert command(*words).status == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [SimpleNamespace(**line) for line in lines if line["kind"] == "evaluation"]
    sign = 1 if figure == "loss" else -1
    best = min(seen, key=lambda one: (sign * getattr(one, figure or "accuracy"), one.loss))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["evaluation"]["step"] == best.step
    assert len(seen) == 12 or len(seen) == best.step + 4, "early stopping follows the same figure"


def test_a_figure_that_there_is_not(command, short_bert, rows_folder, tmp_path):
    for name in ("tune", "plan"):
        words = [name, *tune_words(short_bert, rows_folder, tmp_path / "run", "train.best=macro_f2")[1:]]
        done = command(*words)
        assert (
            done.status == 1
            and "accuracy, macro_f1, loss" in done.err
            and "Did you mean 'macro_f1'" in done.err
        )
        assert not (tmp_path / "run").exists()
    done = command(
        *tune_words(short_bert, rows_folder, tmp_path / "run", "train.best=loss", "data.eval=null")
    )
    assert done.status == 1 and "needs rows to evaluate on" in done.err


@pytest.mark.parametrize("value,told", [(math.nan, "NaN"), (math.inf, "infinite")])
def test_best_weights_that_are_not_finite(tmp_path, value, told):
    parameters = {"a": torch.ones(2), "b": torch.tensor([1.0, value])}
    save_best(tmp_path, parameters)
    with pytest.raises(UserError, match=f"'b' contains {told} values"):
        load_best(tmp_path, {name: torch.zeros(2) for name in parameters})
