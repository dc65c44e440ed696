"""A run outlives its terminal: standard output and error may be full, closed, or have no reader."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
from conftest import forked, tune_words

import graftkit.runs.tune  # noqa: F401  (each child would import it)
from graftkit.cli.main import main

pytestmark = pytest.mark.slow


def closed(number: int) -> None:
    os.close(number)
    setattr(sys, {1: "stdout", 2: "stderr"}[number], None)


def full(number: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def unread(number: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)


@pytest.mark.parametrize("break_", [closed, full, unread])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.slow
def test_a_run_goes_on_without_its_display(short_bert, rows_folder, tmp_path, break_, number, as_json):
    words = tune_words(short_bert, rows_folder, tmp_path / "run", "train.steps=2", *["--json"] * as_json,
                      method="head()")  # fmt: skip

    def work() -> None:
        break_(number)
        main(words)

    done = forked(work)
    lost = as_json and number == 1 and break_ is not closed  # the result has no reader
    assert done.status == int(lost), done.err
    assert "Traceback" not in done.err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2


@pytest.mark.parametrize("words", [["methods"], ["recipe"], ["tasks", "--json"], ["nonsense"]])
@pytest.mark.parametrize("break_", [closed, full, unread])
def test_no_command_fails_with_a_traceback(words, break_):
    def work() -> None:
        break_(1)
        main(words)

    done = forked(work)
    assert done.status in (0, 1) and "Traceback" not in done.err, done.err


def test_a_closed_terminal_stops_a_run_with_its_checkpoint(short_bert, rows_folder, tmp_path, monkeypatch):
    words = tune_words(short_bert, rows_folder, tmp_path / "run", "train.steps=400")

    def work() -> None:
        from graftkit.report.console import Console

        monkeypatch.setattr(Console, "step", lambda *given: os.kill(os.getpid(), signal.SIGHUP))
        main(words)

    done = forked(work)
    assert done.status == 130 and "the checkpoint is written" in done.err, done.err
    assert list((tmp_path / "run" / "checkpoints").iterdir())
