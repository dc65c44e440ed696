"""`train.trackers`: experiment trackers get the lines of metrics.jsonl, and never cost a run."""

from __future__ import annotations

import json

import pytest
from accelerate import tracking
from conftest import tune_words

LOGGED: list = []


class Recorder:
    name = "recorder"
    requires_logging_directory = True
    fails_at = None

    def __init__(self, run_name, logging_dir):
        LOGGED.clear()
        LOGGED.append((run_name, logging_dir))

    def store_init_configuration(self, values):
        assert all(isinstance(value, bool | int | float | str) for value in values.values())
        LOGGED.append(values)
        self._maybe("start")

    def log(self, values, step=None):
        self._maybe(step)
        LOGGED.append((step, values))

    def finish(self):
        self._maybe("finish")
        LOGGED.append("finished")

    def _maybe(self, moment):
        if moment == type(self).fails_at:
            raise ConnectionError("no network")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(tracking, "_available_trackers", ["recorder"])
    monkeypatch.setattr(Recorder, "fails_at", None)
    return Recorder


def tuned(command, tiny_bert, rows_folder, out, trackers="[recorder]"):
    more = ["train.steps=3", f"train.trackers={trackers}"]
    return command(*tune_words(tiny_bert, rows_folder, out, *more, method="head()"))


def test_a_tracker_gets_every_line_of_the_log(command, recorder, tiny_bert, rows_folder, tmp_path):
    out = tmp_path / "run"
    assert tuned(command, tiny_bert, rows_folder, out).status == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (
        LOGGED[0] == ("run", str(out / "trackers"))
        and LOGGED[1]["train.steps"] == 3
        and LOGGED[-1] == "finished"
    )
    logged = LOGGED[2:-1]
    assert len(logged) == len(lines)
    losses = [values["train/loss"] for _, values in logged if "train/loss" in values]
    assert losses == [line["loss"] for line in lines if line["kind"] == "step"]
    steps = [step for step, values in logged if "eval/accuracy" in values]
    assert steps == [line["step"] for line in lines if line["kind"] != "step"]


@pytest.mark.parametrize("moment", ["start", 2, "finish"])
def test_a_tracker_that_fails_is_reported_once_and_dropped(
    command, recorder, tiny_bert, rows_folder, tmp_path, monkeypatch, moment
):
    monkeypatch.setattr(recorder, "fails_at", moment)
    done = tuned(command, tiny_bert, rows_folder, tmp_path / "run")
    assert done.status == 0
    told = "the tracker 'recorder' failed and is now disabled: ConnectionError: no network"
    assert f"warning: {told}" in done.out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["problems"] == [told] and result["steps"] == 3
    assert [entry[0] for entry in LOGGED[2:] if entry != "finished"] == {
        "start": [],
        2: [1],
        "finish": [1, 2, 3, 3, 3],
    }[moment]


def test_a_tracker_that_there_is_not(command, recorder, tiny_bert, rows_folder, tmp_path):
    done = tuned(command, tiny_bert, rows_folder, tmp_path / "run", "[tensorbord]")
    assert done.status == 1 and "Did you mean 'tensorboard'" in done.err
    done = tuned(command, tiny_bert, rows_folder, tmp_path / "run", "[tensorboard]")
    assert done.status == 1 and "pip install tensorboard" in done.err
    assert not (tmp_path / "run").exists()
