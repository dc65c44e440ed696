"""What fails after the last step costs no run: the graft and the result are there, and the failure is reported."""

from __future__ import annotations

import json

import pytest
from conftest import tune_words

import graftkit
from graftkit.runs import describing, monitor
from graftkit.tasks.classify.task import Classify


def broken(*given, **more):
    raise KeyError("graph")


def fails_on_test_rows(self, outcomes, dataset, labels, intervals=True, plain=Classify.metrics):
    if len(dataset) == 96:
        raise KeyError("graph")
    return plain(self, outcomes, dataset, labels, intervals)


@pytest.mark.parametrize(
    ("owner", "name", "failing", "told"),
    [
        (describing, "model_card", broken, "writing the model card (README.md) failed: KeyError: 'graph'"),
        (monitor, "write_report", broken, "writing the report failed: KeyError: 'graph'"),
        (monitor, "show_end", broken, "showing the result failed"),
        (Classify, "worst", broken, "finding the worst eval rows failed"),
        (Classify, "metrics", fails_on_test_rows, "evaluating the test rows failed"),
    ],
)
@pytest.mark.sampled(2)
def test_a_failure_after_the_last_step(
    command, tiny_bert, rows_folder, tmp_path, monkeypatch, owner, name, failing, told
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        test = f"data.test={rows_folder / 'train.csv'}"
        done = command(*tune_words(tiny_bert, rows_folder, out, "train.steps=2", test, method="head()"))
    assert done.status == 0 and f"warning: {told}" in done.out
    result = json.loads((out / "result.json").read_text())
    assert any(told in problem for problem in result["problems"])
    assert result["metrics"]["rows"] == (40 if name == "metrics" else 96)
    assert "already finished" in command("tune", "--resume", out).out
    assert len(graftkit.Run(out, result).predict(["a plum"])) == 1
