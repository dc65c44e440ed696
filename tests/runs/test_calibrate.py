"""Runs are calibrated on their evaluation rows; `predict`, `evaluate` and `export` use what was fitted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_rows, tune_words

import graftkit
from graftkit.insight import confidence_file
from graftkit.runs import confidence
from graftkit.runs.predict import load_run, open_run, predict
from graftkit.tasks.base import Reading

TEXTS = ["the old hammer", "a very new plum", "my cherry is here", "of the drill"]


def logits_of(run, texts=TEXTS) -> torch.Tensor:
    """The outputs of a run without any calibration."""
    opened = open_run(run)
    loaded = load_run(opened)
    given = opened.task.given(texts, opened.columns)
    examples = opened.task.examples(
        opened.task.read(given, Reading(), "rows"), opened.columns, opened.labels, False, False
    )
    dataset = opened.task.dataset(examples, loaded.backbone, loaded.max_length)
    with torch.no_grad():
        return loaded.forward(dataset.batch(np.arange(len(texts)), loaded.forward.device)).float().cpu()


def fitted(run):
    opened = open_run(run)
    return confidence_file.read(run / "graft", opened.about)


def test_a_run_answers_with_calibrated_probabilities(finished):
    found, result = fitted(finished), json.loads((finished / "result.json").read_text())
    told = result["confidence"]
    assert told["temperature"] == found.temperature != 1 and told["rows"] == 40 and len(found.scores) == 40
    assert told["known"]["threshold"] == found.known.threshold and len(found.known.labels) == 96
    wanted = (logits_of(finished) / found.temperature).softmax(1)
    answers = predict(finished, TEXTS, coverage=0.9)
    limit = found.scores[int(np.ceil(41 * 0.9)) - 1]
    for answer, chances in zip(answers, wanted.numpy()):
        best = int(chances.argmax())
        assert answer["label"] == ("fruit", "tool")[best] == answer["labels"][0]
        assert answer["probability"] == pytest.approx(chances[best], abs=2e-4)
        assert (len(answer["labels"]) == 2) == (1 - chances.min() <= limit) and isinstance(
            answer["known"], bool
        )
    assert [set(answer) for answer in predict(finished, TEXTS)] == [
        {"text", "label", "probability", "known"}
    ] * 4
    assert "temperature" in (finished / "README.md").read_text()
    assert "before temperature scaling" in (finished / "report.html").read_text()


def test_the_command_shows_sets_and_what_is_unknown(command, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    plain = command("predict", run, *TEXTS).out.splitlines()
    sets = command("predict", run, "--coverage", "0.9", *TEXTS).out.splitlines()
    assert [line.split("\t")[-1] for line in plain] == TEXTS and len(sets[0].split("\t")) == 4
    found = fitted(run)
    far = replace(found, known=replace(found.known, threshold=1.5))
    confidence_file.write(run / "graft", open_run(run).about, far)
    line = command("predict", run, TEXTS[0]).out.split("\t")
    assert line[0] == f"unknown ({predict(run, TEXTS[:1])[0]['label']})"
    assert json.loads(command("predict", run, TEXTS[0], "--json").out)["predictions"][0]["known"] is False
    done = command("evaluate", run, "--data", finished / ".." / "none.csv")
    assert done.status == 1  # the file is not there


def test_evaluate_tells_the_error_with_and_without_the_temperature(command, finished, rows_folder):
    found = json.loads(command("evaluate", finished, "--data", rows_folder / "eval.csv", "--json").out)
    told = json.loads((finished / "result.json").read_text())["confidence"]
    assert found["confidence"] == pytest.approx(
        {name: told[name] for name in ("temperature", "before", "after")}, abs=1e-6
    )
    assert found["confidence"]["before"] == pytest.approx(found["metrics"]["calibration"]["error"], abs=1e-6)
    assert "calibration error" in command("evaluate", finished, "--data", rows_folder / "eval.csv").out


@pytest.mark.usefixtures("few_compared")
def test_an_export_gives_the_same_probabilities(finished, tmp_path):
    from transformers import AutoModelForSequenceClassification

    done = graftkit.Run(finished, {}).export(tmp_path / "model")
    assert done["calibrated"] and done["same_answers"]
    inside = load_run(open_run(finished)).backbone.processor
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    answers = predict(finished, TEXTS)
    for text, answer in zip(TEXTS, answers):
        with torch.no_grad():
            chances = model(**inside(text, return_tensors="pt")).logits.softmax(1)
        assert float(chances.max()) == pytest.approx(answer["probability"], abs=1e-3)


def test_a_run_of_an_earlier_version_answers_as_before(command, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "graft" / "confidence.safetensors").unlink()
    answers, wanted = predict(run, TEXTS), logits_of(run).softmax(1).max(1).values
    assert [set(answer) for answer in answers] == [{"text", "label", "probability"}] * 4
    assert [answer["probability"] for answer in answers] == pytest.approx(wanted.tolist(), abs=2e-4)
    done = command("predict", run, "--coverage", "0.9", TEXTS[0])
    assert done.status == 1 and f"graftkit calibrate {run} --data FILE" in done.err
    assert command("evaluate", run, "--data", run / "no").status == 1


def test_a_run_without_evaluation_rows_is_calibrated_later(command, tiny_bert, rows_folder, tmp_path):
    run = tmp_path / "run"
    words = tune_words(
        tiny_bert, rows_folder, run, "train.steps=6", "data.eval=null", method="head(pooling='mean')"
    )
    words = [word for i, word in enumerate(words) if "--eval" not in words[max(0, i - 1) : i + 1]]
    assert command(*words).status == 0
    assert json.loads((run / "result.json").read_text())["confidence"] == {} and fitted(run) is None
    done = command("predict", run, "--coverage", "0.9", TEXTS[0])
    assert done.status == 1 and "graftkit calibrate" in done.err and len(done.err.splitlines()) == 1
    done = command("calibrate", run, "--data", rows_folder / "eval.csv", "--known", "0.9", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert (
        found["rows"] == 40
        and found["known"]["rows"] == 96
        and found["temperature"] == fitted(run).temperature
    )
    assert json.loads((run / "result.json").read_text())["confidence"]["rows"] == 40
    assert len(predict(run, TEXTS, coverage=0.9)[0]["labels"]) in (1, 2)
    rows = [predict(run, [row["text"]])[0]["known"] for row in make_rows(1)]
    assert isinstance(rows[0], bool)
    again = graftkit.Run(run, {}).calibrate(str(rows_folder / "eval.csv"), known=0.5)
    assert (
        again["known"]["threshold"] > found["known"]["threshold"]
        and again["temperature"] == found["temperature"]
    )
    known = graftkit.Run(run, {}).calibrate(str(rows_folder / "train.csv"))
    assert "96 of 96 rows are training rows of this run" in known["note"] and "note" not in found
    for coverage in ("1", "0", "2"):
        done = command("predict", run, "--coverage", coverage, TEXTS[0])
        assert done.status == 1 and "must be above 0 and below 1" in done.err
    done = command("predict", run, "--coverage", "0.99", TEXTS[0])
    assert done.status == 1 and "needs at least 99 evaluation rows, but 96" in done.err
    assert "known is 1.0" in command("calibrate", run, "--data", rows_folder / "eval.csv", "--known", "1").err


def test_a_failure_of_calibration_costs_no_run(command, tiny_bert, rows_folder, tmp_path, monkeypatch):
    def broken(*given, **more):
        raise KeyError("graph")

    monkeypatch.setattr(confidence, "fit", broken)
    done = command(*tune_words(tiny_bert, rows_folder, tmp_path / "run", "train.steps=2", method="head()"))
    assert done.status == 0 and "warning: calibrating failed: KeyError: 'graph'" in done.out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["confidence"] == {}
    assert len(predict(tmp_path / "run", TEXTS)) == 4


def test_a_damaged_file_is_one_error(command, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "graft" / "confidence.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    done = command("predict", run, TEXTS[0])
    assert done.status == 1 and str(path) in done.err and len(done.err.splitlines()) == 1


def test_sets_of_labels_keep_their_answers(tiny_bert, tmp_path):
    """A threshold that is not 0.5 moves with the probabilities."""
    rows = [
        {"text": row["text"], "labels": [row["label"]] + ["long"] * (len(row["text"]) > 30)}
        for row in make_rows(120)
    ]
    run = graftkit.tune(
        model=str(tiny_bert), task="classify(kind='multi', threshold=0.3)", method="head()", train=rows[:60],
        eval=rows[60:], out=tmp_path / "run", settings={"train.steps": 8, "train.precision": "fp32", "train.lr": 0.003},
    )  # fmt: skip
    texts = [row["text"] for row in rows[:20]]
    temperature = run.result["confidence"]["temperature"]
    chances = (logits_of(run.path, texts) / temperature).sigmoid().numpy()
    raw = logits_of(run.path, texts).sigmoid().numpy()
    limit = float(chances[0, 0] + raw[0, 0]) / 2  # the temperature moves a probability across it
    assert temperature != 1 and ((chances > limit) != (raw > limit)).any()
    names = open_run(run.path).labels
    for answer, after, before in zip(run.predict(texts, {"threshold": limit}), chances, raw):
        assert answer["labels"] == [name for name, p in zip(names, before) if p > limit]
        assert list(answer["probabilities"].values()) == pytest.approx(after.tolist(), abs=2e-4)
        assert isinstance(answer["known"], bool)
    with pytest.raises(
        graftkit.UserError, match=r"coverage gives sets of labels, .*classify\(\) of this run"
    ):
        run.predict(texts, coverage=0.9)


def test_a_task_without_classes_is_refused(command, tiny_bert, tmp_path):
    rows = [{"text": row["text"], "score": len(row["text"])} for row in make_rows(40)]
    run = graftkit.tune(
        model=str(tiny_bert), task="classify(kind='regression')", method="head()", train=rows, eval=rows[:30],
        out=tmp_path / "run", settings={"train.steps": 1},
    )  # fmt: skip
    assert run.result["confidence"] == {} and not (run.path / "graft" / "confidence.safetensors").exists()
    with pytest.raises(graftkit.UserError, match="cannot be calibrated"):
        run.calibrate(rows)
