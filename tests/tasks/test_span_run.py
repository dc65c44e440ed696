"""Question answering from the file to the exported model: tune, plan, evaluate, predict, resume, export."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import equal_bits, graft_tensors, without_graftkit
from squad_rows import articles, official_1, official_2, write_squad

import graftkit
from graftkit.errors import Interrupted, UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_compared")]

FAST = {"train.precision": "fp32", "train.batch_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """train.json, test.json (SQuAD 1.1), train2.json, test2.json (2.0: a third of the questions has no answer)."""
    folder = tmp_path_factory.mktemp("squad")
    for name, count, seed in (("train", 60, 1), ("test", 12, 2)):
        write_squad(folder / f"{name}.json", articles(count, seed))
        write_squad(folder / f"{name}2.json", articles(count, seed, answerless=True))
    return folder


@pytest.fixture(scope="module")
def learned(short_bert, folder, tmp_path_factory) -> graftkit.Run:
    """A run that has learned what is asked for; a third of the questions has no answer."""
    return graftkit.tune(
        model=str(short_bert), task="span", train=folder / "train2.json", test=folder / "test2.json",
        method="full(lr=0.005) + head()", out=tmp_path_factory.mktemp("runs") / "run", eval=0.2,
        settings={**FAST, "train.epochs": 12.0, "train.evaluate_every": "6 epochs"},
    )  # fmt: skip


def test_a_run_learns_answers_and_that_there_is_none(learned, folder):
    metrics, settled = learned.metrics, json.loads((learned.path / "graft" / "graft.json").read_text())
    assert metrics["f1"] > 0.8 and metrics["has_answer_f1"] > 0.7 and metrics["no_answer_f1"] > 0.7
    evaluation = learned.result["evaluation"]
    assert (
        metrics["threshold"] == evaluation["threshold"]
        and f"threshold={metrics['threshold']!r}" in settled["task"]
    )
    assert evaluation["rows"] == 36 and metrics["rows"] == 36  # 12 whole articles of three questions each
    again = learned.evaluate(folder / "test2.json")
    assert again["f1"] == metrics["f1"] and again["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    plan = json.loads((learned.path / "plan.json").read_text())
    assert plan["statistics"]["train"]["labels"] == {"answer": 96, "no answer": 48}
    assert plan["statistics"]["test"]["contexts"] == 12


def test_figures_are_those_of_the_predictions(learned, folder):
    """The official figures of what predict writes are those that evaluate says."""
    rows = learned.predict(str(folder / "test2.json"))
    golds = {}
    for article in json.loads((folder / "test2.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                golds[qa["id"]] = [answer["text"] for answer in qa["answers"]]
    pairs = [official_2(golds[row["id"]], row["answer"]) for row in rows]
    exact, f1 = (sum(part) / len(rows) for part in zip(*pairs))
    assert (learned.metrics["exact_match"], learned.metrics["f1"]) == pytest.approx((exact, f1))
    for row in rows:
        if row["answer"]:
            assert row["context"][row["start"] : row["end"]] == row["answer"]
        else:
            assert row["start"] is None and row["end"] is None
        assert 0 < row["probability"] <= 1


def test_predict_on_the_command_line(learned, command, folder):
    question, context = "the hammer here", "my old drill is a cherry here"
    done = command("predict", learned.path, question, context)
    assert (
        done.status == 0
        and done.out.startswith("drill\t")
        and done.out.rstrip().endswith(f"\t7-12\t{question}")
    )
    assert context not in done.out
    assert learned.predict([(question, context)])[0]["answer"] == "drill"
    done = command("predict", learned.path, "--data", folder / "test2.json", "--json")
    assert len(json.loads(done.out)["predictions"]) == 36
    more = command("predict", learned.path, question, context, "--option", "threshold=-100")
    assert more.status == 0 and more.out.startswith("(no answer)\t") and "\t-\t" in more.out
    done = command("predict", learned.path, question)
    assert done.status == 1 and "QUESTION and CONTEXT" in done.err
    done = command("evaluate", learned.path, "--data", folder / "test2.json")
    assert done.status == 0 and "exact match" in done.out


def test_worst_answers_are_kept(learned):
    rows = [json.loads(line) for line in (learned.path / "worst.jsonl").read_text().splitlines()]
    assert all(
        row["f1"] < 1 and {"where", "question", "expected", "answer", "loss"} <= set(row) for row in rows
    )
    for row in rows:
        marked = {
            name: [row["context"][start:end] for start, end, _ in row["marks"][name]]
            for name in ("expected", "answer")
        }
        assert " / ".join(dict.fromkeys(marked["expected"])) == row["expected"].replace("no answer", "")
        assert "".join(marked["answer"]) == row["answer"].replace("no answer", "")


@pytest.mark.parametrize(
    "method", ["head()", "lora(rank=4) + head(pooling='tokens')", "prefix() + head(hidden=8)"]
)
def test_other_methods_and_long_contexts(short_bert, tmp_path, command, method):
    """Windows of 32 tokens on contexts of 60: rows of the plan are windows, and kept outputs change nothing."""
    path = write_squad(tmp_path / "long.json", articles(8, 3, words=60))
    words = [
        "--model", short_bert, "--task", "span(doc_stride=8)", "--train", path, "--eval", path, "--method", method,
        "train.precision=fp32", "data.max_length=32", "train.epochs=2",
    ]  # fmt: skip
    plan = json.loads(command("plan", *words, "--json").out)
    done = command("tune", *words, "--out", tmp_path / "run", "--json")
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert plan["rows"] > 24 * 3 and result["steps"] == 2 * plan["steps_per_epoch"] == plan["steps"]
    again = graftkit.Run(tmp_path / "run", result).evaluate(path)
    assert again["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_model_that_reads_from_left_to_right(tiny_gpt2, folder, tmp_path):
    run = graftkit.tune(
        model=str(tiny_gpt2), task="span", train=folder / "train.json", test=folder / "test.json", eval=None,
        method="full(lr=0.003) + head()", out=tmp_path / "run", settings={**FAST, "train.epochs": 8.0},
    )  # fmt: skip
    assert run.metrics["f1"] > 0.6  # chance is near 1 in 15
    rows = run.predict(str(folder / "test.json"))
    pairs = [official_1([row["answer"]], row["answer"]) for row in rows]
    assert all(pair == (1, 1) for pair in pairs)


def test_a_killed_run_goes_on_to_the_same_end(short_bert, folder, tmp_path, monkeypatch):
    import graftkit.runs.monitor

    given = {
        "model": str(short_bert), "task": "span", "train": folder / "train2.json", "method": "lora(rank=2, dropout=0.1) + head()",
        "settings": {**FAST, "train.steps": 6, "train.checkpoint_every": 1, "train.evaluate_every": 2},
    }  # fmt: skip
    whole = graftkit.tune(**given, out=tmp_path / "whole")
    plain = graftkit.runs.monitor.Watch.log

    def log(self, step):
        plain(self, step)
        if step.number == 3:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patch:
        patch.setattr(graftkit.runs.monitor.Watch, "log", log)
        with pytest.raises(Interrupted):
            graftkit.tune(**given, out=tmp_path / "run")
    resumed = graftkit.resume(tmp_path / "run")
    assert equal_bits(graft_tensors(resumed.path), graft_tensors(whole.path))
    assert resumed.metrics == whole.metrics
    left, right = ((path / "graft" / "graft.json").read_text() for path in (resumed.path, whole.path))
    assert left == right and "threshold=" in left


PLAIN = """
import json, sys, torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
model = AutoModelForQuestionAnswering.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
answers = []
for question, context in json.loads(sys.argv[2]):
    given = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets, parts = given.pop("offset_mapping")[0], given.sequence_ids(0)
    with torch.no_grad():
        output = model(**given)
    outside = torch.tensor([part != 1 for part in parts])
    start = output.start_logits[0].masked_fill(outside, -1e9)
    end = output.end_logits[0].masked_fill(outside, -1e9)
    sums = (start[:, None] + end[None, :]).triu()
    sums[torch.ones_like(sums).tril(-1).bool()] = -1e9
    best = int(sums.argmax())
    answers.append(context[offsets[best // len(start)][0] : offsets[best % len(start)][1]])
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_an_exported_model_gives_the_same_answers(learned, command, tmp_path):
    done = command("export", learned.path, "--to", tmp_path / "model", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["native"] and found["largest_difference"] < 1e-4
    assert "BertForQuestionAnswering.from_pretrained" in found["load_with"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["BertForQuestionAnswering"] and config["id2label"] == {
        "0": "start",
        "1": "end",
    }
    pairs = [("the hammer here", "my old drill is a cherry here"), ("the apple here", "a plum and the saw")]
    printed = without_graftkit(PLAIN, tmp_path / "model", json.dumps(pairs))
    assert json.loads(printed) == [row["answer"] for row in learned.predict(pairs)] == ["drill", "plum"]


def test_a_pooling_for_whole_texts_is_refused(short_bert, folder, tmp_path):
    with pytest.raises(UserError, match="an output for each token"):
        graftkit.tune(
            model=str(short_bert), task="span", train=folder / "train.json", method="head(pooling='mean')",
            out=tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
