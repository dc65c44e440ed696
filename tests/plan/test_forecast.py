"""Forecasts of whole runs: their parts, limits, other machines, and what earlier runs taught."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_rows, write_csv

from graftkit.cli.main import main
from graftkit.engine.trial import Trial
from graftkit.plan import history
from graftkit.plan.forecast import BEGINNING, Forecast
from graftkit.recipe import schema as recipes
from graftkit.report.console import Console
from graftkit.runs.foresight import Reality
from graftkit.runs.trial import Tried
from graftkit.runs.tune import run_recipe


@pytest.fixture
def planned(short_bert, tmp_path, capsys, monkeypatch):
    """Run a command on the tiny model and return its JSON."""
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GRAFTKIT_FORECAST", "1")
    rows = write_csv(tmp_path / "rows.csv", make_rows(32))

    def run(*words: str, command: str = "plan", status: int = 0) -> dict:
        given = ["--model", str(short_bert), "--train", str(rows), "train.epochs=1", *words, "--json"]
        with pytest.raises(SystemExit) as stopped:
            main([command, *given])
        found = json.loads(capsys.readouterr().out)
        assert (stopped.value.code or 0) == status, found
        return found

    run.model, run.rows = str(short_bert), str(rows)
    return run


def test_the_parts_of_a_plan(planned):
    found = planned("--method", "full() + head()", "train.batch_size=8")
    memory, seconds = found["memory_bytes"], found["seconds"]
    parts = [memory[name] for name in ("weights", "gradients", "optimizer", "activations", "other")]
    assert sum(parts) == memory["peak"] and min(parts) > 0
    assert memory["interval"][0] < memory["peak"] < memory["interval"][1]
    assert memory["optimizer"] == found["optimizer_bytes"] and memory["gradients"] == found["gradient_bytes"]
    assert seconds["total"] == pytest.approx(
        BEGINNING + seconds["epoch"] + seconds["evaluation"] + seconds["filling"], abs=1e-3
    )
    assert found["flops"]["total"] >= found["flops"]["step"] * found["steps"] > 0
    assert sum(found["time"].values()) == pytest.approx(1, abs=0.01)
    assert found["plan_error"] is None and found["forecast_note"] is None


def test_measuring_rates_leaves_the_random_states(planned):
    """A first run measures and later ones read what it found: both have to go on with the same numbers."""
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    planned()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_a_run_says_what_it_took_and_the_next_plan_how_right_that_was(planned, tmp_path):
    result = planned("--out", str(tmp_path / "run"), command="tune")
    for side in ("predicted", "measured"):
        assert result[side]["seconds"] > 0 and result[side]["peak_memory_bytes"] > 0
    assert result["measured"]["seconds"] == pytest.approx(result["seconds"], abs=0.02)
    errors = planned()["plan_error"]
    wrong = abs(result["measured"]["seconds"] / result["predicted"]["seconds"] - 1)
    assert errors["seconds"]["runs"] == 1
    assert errors["seconds"]["median"] == pytest.approx(wrong, rel=0.02)


def test_a_run_is_the_same_with_and_without_a_trial(planned, tmp_path, monkeypatch):
    """Its losses and weights, bit for bit: a model with dropout, and a trial whose result a second run takes from the cache."""
    made: list[int] = []
    measured = Tried.measured
    monkeypatch.setattr(Tried, "measured", lambda self: made.append(1) or measured(self))
    found = {}
    for name, wanted in (("with", "1"), ("again", "1"), ("without", "0")):
        monkeypatch.setenv("GRAFTKIT_FORECAST", wanted)
        result = planned("--method", "lora() + head()", "--out", str(tmp_path / name), command="tune")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines if json.loads(line)["kind"] == "step"]
        weights = next((tmp_path / name / "graft").glob("*.safetensors")).read_bytes()
        found[name] = losses, weights
        assert ("predicted" in result) == (wanted == "1")
    assert len(made) == 1
    assert found["with"] == found["without"] == found["again"] and len(found["with"][0]) > 0


def test_a_trial_that_fails_ends_no_run(planned, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Trial, "_gradients", fails)
    console = Console(quiet=True)
    said: list[str] = []
    monkeypatch.setattr(console, "pairs", lambda rows: said.extend(f"{a}: {b}" for a, b in rows))
    recipe = {"model": planned.model, "data": {"train": planned.rows}, "train": {"epochs": 1.0}}
    run = run_recipe(recipes.make({**recipe, "out": str(tmp_path / "run")}), console)
    assert run.result["predicted"]["seconds"] > 0 and run.result["steps"] > 0
    assert any("the trial of its batches failed (RuntimeError: DefaultCPUAllocator" in line for line in said)


def test_the_time_left_follows_the_steps():
    reality = object.__new__(Reality)
    reality.steps = 100
    seconds = {"step": 1.0, "filling": 5.0, "total": 125.0, "evaluation": 20.0}
    reality.foreseen = Forecast({}, seconds, {}, {})
    assert reality.left(50, 50.0) == pytest.approx(50 + 10)
    assert 60 < reality.left(50, 100.0) < 120  # twice as long as foreseen, but for what the forecast counts
    reality.foreseen = None
    assert reality.left(50, 50.0) is None


def test_limits_of_memory_choose_smaller_batches(planned, monkeypatch):
    monkeypatch.setattr("graftkit.runs.within.resident", lambda: 0)
    monkeypatch.setattr("graftkit.plan.forecast.CPU_LEAST", 0.0)  # which is more than all of a tiny model
    free = planned("--memory", "4GB", "--method", "full() + head()")
    assert free["gave_up"] == []
    memory = free["memory_bytes"]
    limit = memory["peak"] - 0.3 * memory["activations"]
    tight = planned("--memory", f"{limit / 1e6:.2f}MB", "--method", "full() + head()")
    assert tight["memory_bytes"]["peak"] <= limit
    assert "batches of 32 rows, for" in tight["gave_up"][0] and tight["batch_size"] == 32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory", "1kB", "train.batch_size=1"], "the least memory is"),  # no smaller batches to try
        (["--memory", "a lot"], "--memory 'a lot' must be a size such as '8GB'"),
        (["--time", "a while"], "--time 'a while' must be a time such as '30 s'"),
        (["--on", "h1000"], "known: "),
        (["--gpus", "8"], "--gpus goes with --on"),
        (["--tokens", "7T"], "--tokens goes with --geometry"),
    ],
)
def test_limits_that_cannot_be(planned, words, said):
    assert said in planned(*words, status=1)["error"]


def test_another_machine(planned):
    one = planned("--on", "h100", "train.batch_size=2")
    eight = planned("--on", "h100", "--gpus", "8", "train.batch_size=2")
    assert one["precision"] == "bf16" and "fits one h100" in one["forecast_note"]
    assert eight["seconds"]["epoch"] == pytest.approx(
        one["seconds"]["epoch"] * 2 / 15, rel=0.01
    )  # of 15 batches


def test_advice(planned, monkeypatch):
    """Of a tiny model most of a step is Python; with no memory at all, that comes first."""
    assert "larger train.batch_size" in planned("train.batch_size=2")["advice"][0]
    monkeypatch.setattr("graftkit.runs.foresight.host_memory", lambda: 1)
    assert "may not fit" in planned("train.batch_size=2")["advice"][0]


def test_earlier_runs_make_the_interval(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"machine": "m", "predicted": 3}\nnot json\n')
    for ratio in (1.8, 1.9, 2.0, 2.1, 2.2, 2.0, 2.0, 2.0):
        predicted = {"seconds": 10.0, "peak_memory_bytes": 100}
        measured = {"seconds": 10 * ratio, "peak_memory_bytes": 110}
        history.add("m", history.TRIAL, predicted, measured, path)
    known = history.read("m", history.TRIAL, path)
    assert known.interval("seconds", 1.0) == pytest.approx([1.0, 2.165], abs=0.01)
    assert known.errors()["peak_memory_bytes"] == {"runs": 8, "median": 0.1, "largest": 0.1}
    other = history.read("m", history.COUNT, path)
    assert other.interval("seconds", 1.4)[0] == pytest.approx(1.0)  # a default
    assert other.errors() == known.errors()
    assert history.read("another", history.TRIAL, path).errors() is None


def test_the_file_of_earlier_runs_is_bounded(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps({"machine": str(i)}) + "\n" for i in range(500)))
    history.add("m", history.TRIAL, {"seconds": 1.0}, {"seconds": 1.0}, path=path)
    assert len(path.read_text().splitlines()) == history.MOST
