"""Multiple choice: every form of choices and labels, the loss over choices, runs from end to end, what is refused."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest
import torch
from conftest import ANIMAL, FILLER, FRUIT, TOOL, equal_bits, graft_tensors, write_csv
from transformers import BertForMultipleChoice

import graftkit
from graftkit.backbone.load import load_backbone
from graftkit.backbone.source import find_source
from graftkit.errors import Interrupted, UserError
from graftkit.tasks.base import Reading
from graftkit.tasks.choice import Choice, find_label, read_choices

COLUMNS = {"question": "question", "choices": "choices", "label": "label"}


def make_rows(count: int, seed: int = 0, sizes: tuple[int, ...] = (3,)) -> list[dict]:
    """Among texts with a tool or an animal the one with a fruit is right."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        size = sizes[i % len(sizes)]
        label = draw.randrange(size)
        words = [draw.choice(FRUIT if place == label else TOOL + ANIMAL) for place in range(size)]
        choices = [f"{draw.choice(FILLER)} {word}" for word in words]
        rows.append({"question": f"{draw.choice(FILLER)} here", "choices": choices, "label": label})
    return rows


def examples(rows, columns=None, **more):
    task = Choice()
    table = task.read(rows, Reading(), "rows")
    return task.examples(table, columns or COLUMNS, (), **{"skip_bad": False, **more})


@pytest.mark.parametrize(
    ("label", "choices", "keys", "place"),
    [
        (2, "xyz", "", 2),
        (np.int64(1), "xyz", "", 1),
        (1.0, "xyz", "", 1),
        ("1", "xyz", "", 1),
        ("B", "xyz", "", 1),
        ("c", "xyz", "", 2),
        ("y", "xyz", "", 1),
        (" y ", "xyz", "", 1),
        ("2", "xyz", "123", 1),  # the names of the choices come first
        ("A", "BCA", "ABC", 0),
        (0, ["2", "1"], "", 0),  # a number in JSON is a place
        ("3", ["2", "3"], "", 1),  # no place, so it is the text
        ("true", ["false", "true"], "", 1),
    ],
)
def test_what_labels_mean(label, choices, keys, place):
    assert find_label(label, list(choices), list(keys)) == place


@pytest.mark.parametrize(
    ("label", "choices", "said"),
    [
        (3, "xyz", "out of range for 3 choices (0 to 2); places count from 0"),
        (-1, "xyz", "the label -1 is out of range"),
        ("7", "xyz", "the label 7 is out of range"),
        ("D", "xyz", "neither a place (0 to 2) or letter (A to C), nor the text of one ('x', 'y', 'z')"),
        ("who", "xyz", "the label 'who' is no choice"),
        (None, "xyz", "the label is empty"),
        ("1", ["1", "2"], "the text of one choice and the place of another; write the letters"),
        ("B", "BA", "the text of one choice and the place of another"),
        ("so", ["so", "so"], "the text of 2 choices"),
    ],
)
def test_labels_that_mean_nothing(label, choices, said):
    with pytest.raises(ValueError) as error:
        find_label(label, list(choices), [])
    assert said in str(error.value)


def test_all_forms_of_choices_mean_the_same(tmp_path):
    wanted = (["one", "two"], [1])
    forms = [
        {"choices": ["one", "two"], "label": 1},
        {"choices": {"text": ["one", "two"], "label": ["A", "B"]}, "label": "B"},
        {"choices": {"text": np.array(["one", "two"]), "label": ["1", "2"]}, "label": "2"},
        {"choices": '["one", "two"]', "label": "1"},
        {"choice0": "one", "choice1": "two", "label": "two"},
        {"choice2": "two", "choice1": "one", "label": "B"},
        {"ending0": "one", "ending1": "two", "ending2": "", "label": 1},
        {"A": "one", "B": "two", "C": None, "label": "B"},
        {"option_a": "one", "option_b": "two", "label": "b"},
        {"Option 1": "one", "Option 2": "two", "label": "two"},
    ]
    for form in forms:
        found = examples([{"question": "who?", **form}])
        assert (found.values["choices"][0], found.targets.tolist()) == wanted, form
    path = write_csv(tmp_path / "t.csv", [{"prompt": "who?", "A": "one", "B": "two", "answer": "B"}])
    pieces = list(Choice().pieces(str(path), Reading(), "t", 10))
    assert pieces[0].columns["choices"] == [["one", "two"]] and "A" not in pieces[0].columns


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": " "}, "column 'question' is empty"),
        ({"choices": ["one"]}, "column 'choices': 1 choice, where at least two"),
        ({"choices": []}, "0 choices"),
        ({"choices": None}, "a NoneType where a list"),
        ({"choices": "one or two"}, "a str where a list of choices should be"),
        ({"choices": "[one"}, "the list of choices is not JSON"),
        ({"choices": ["one", " "]}, "choice 1 (from 0) of 2 is empty"),
        ({"choices": ["one", ["two"]]}, "choice 1 (from 0) is a list, not a text"),
        ({"choices": {"texts": []}}, "an object without 'text' (it has: texts)"),
        ({"choices": {"text": ["one", "two"], "label": ["A", "A"]}}, "names of the choices (A, A) are not one for each of 2"),
        ({"label": 2}, "column 'label': the label 2 is out of range"),
        ({"label": "Z"}, "the label 'Z' is no choice"),
        ({"label": ""}, "the label is empty"),
    ],
)  # fmt: skip
def test_bad_rows(change, said):
    good = {"question": "who?", "choices": ["one", "two"], "label": 0}
    with pytest.raises(UserError) as error:
        examples([{**good, **change}])
    assert said in str(error.value) and "(in memory), row 1" in str(error.value)
    kept = examples([{**good, **change}, good], skip_bad=True)
    assert len(kept) == 1 and said in kept.skipped[0]


def test_an_empty_choice_in_the_middle_of_columns():
    with pytest.raises(UserError, match=r"choice 1 \(from 0\) of 3 is empty"):
        examples([{"question": "q", "A": "one", "B": "", "C": "two", "label": "A"}])


def test_missing_columns(tmp_path):
    rows = [{"question": "who?", "text": "x", "label": 1}]
    task = Choice()
    with pytest.raises(UserError, match=r"no column 'choices'.*or columns choice0, choice1"):
        task.examples(
            task.read(rows, Reading(), "rows"), {"question": "question", "label": "label"}, (), False
        )
    with pytest.raises(UserError, match="no column 'label'"):
        examples([{"question": "q", "choices": ["a", "b"]}], {"question": "question", "choices": "choices"})


def test_scores_are_those_of_the_models_own_class(short_bert):
    """Logits, padded where rows have fewer choices, and the loss beside BertForMultipleChoice with the same weights."""
    backbone = load_backbone(
        find_source(str(short_bert)), "AutoModelForSequenceClassification", labels=["score"]
    )
    model = backbone.model
    other = BertForMultipleChoice(model.config)
    other.load_state_dict(model.state_dict())
    other.eval()
    task, made = Choice(), examples(make_rows(4, 1, (2, 4)))
    dataset = task.dataset(made, backbone, 32)
    batch = dataset.batch(np.arange(4))
    with torch.no_grad():
        logits = dataset.call(model, batch)
    scores = task.learner(dataset, (), 0.0)(lambda _: logits, batch)["loss"]
    assert logits.shape == (4, 4) and torch.isinf(logits).sum() == 4
    tokenizer = backbone.processor
    for i in range(4):
        question, choices = made.values["question"][i], made.values["choices"][i]
        given = tokenizer([question] * len(choices), choices, return_tensors="pt", padding=True)
        with torch.no_grad():
            wanted = other(**{k: v[None] for k, v in given.items()}, labels=torch.tensor([made.targets[i]]))
        assert torch.allclose(logits[i, : len(choices)], wanted.logits[0], atol=1e-5)
        assert scores.losses[i].item() == pytest.approx(wanted.loss.item(), abs=1e-5)
        assert bool(scores.correct[i]) == (wanted.logits[0].argmax() == made.targets[i])


def test_texts_with_a_context(short_bert):
    backbone = load_backbone(find_source(str(short_bert)))
    rows = [{"context": "the old cat", "question": "my dog", "choices": ["hen", "pig"], "label": 0}]
    made = examples(rows, {**COLUMNS, "context": "context"})
    ids = Choice().dataset(made, backbone, 32).batch(np.arange(1)).inputs["input_ids"]
    assert backbone.processor.batch_decode(ids) == [
        f"[CLS] the old cat [SEP] my dog {choice} [SEP]" for choice in ("hen", "pig")
    ]
    alone = examples([{"choices": ["hen", "the pig"], "label": 0}], {"choices": "choices", "label": "label"})
    dataset = Choice().dataset(alone, backbone, 32)
    assert dataset.lengths.tolist() == [7] and len(dataset) == 1


def test_figures():
    task, made = Choice(), examples(make_rows(4, 2, (2, 4)))
    chances = [np.full(len(c), 0.1) for c in made.values["choices"]]
    for i, place in enumerate(made.targets):
        chances[i][place if i < 3 else (place + 1) % 4] = 0.9
    logs = [np.log(c / c.sum()) for c in chances]
    dataset = type("D", (), {"examples": made})
    got = task.metrics(logs, dataset, ())
    assert got["accuracy"] == 0.75 and got["chance"] == pytest.approx(0.375) and got["rows"] == 4
    assert got["loss"] == pytest.approx(-np.mean([logs[i][t] for i, t in enumerate(made.targets)]))
    assert got["accuracy_interval"][0] < 0.75 < got["accuracy_interval"][1]
    worst = task.worst(logs, dataset, (), 5)
    assert len(worst) == 1 and worst[0]["expected"] == made.values["choices"][3][made.targets[3]]
    answer = task.answers(logs, dataset, ())[3]
    assert answer["answer"] == worst[0]["answer"] and sum(answer["probabilities"]) == pytest.approx(
        1, abs=1e-3
    )
    assert task.line({**task.asked(made, 3), **answer}).split("\t")[:2] == [
        answer["answer"],
        f"{answer['probability']:.3f}",
    ]


FAST = {"train.precision": "fp32", "train.batch_size": 16}


@pytest.fixture(scope="module")
def learned(short_bert, tmp_path_factory) -> graftkit.Run:
    folder = tmp_path_factory.mktemp("choice")
    for name, count, seed in (("train", 96, 1), ("test", 24, 2)):
        lines = map(json.dumps, make_rows(count, seed, (2, 3, 4)))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return graftkit.tune(
        model=str(short_bert), task="choice", train=folder / "train.jsonl", test=folder / "test.jsonl",
        method="lora(rank=4) + head()", out=folder / "run", settings={**FAST, "train.lr": 0.01, "train.epochs": 8.0},
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_learns_what_to_choose(learned, command):
    assert learned.metrics["accuracy"] > 0.7 and learned.metrics["chance"] == pytest.approx(
        np.mean([1 / 2, 1 / 3, 1 / 4])
    )
    test = learned.path.parent / "test.jsonl"
    assert learned.evaluate(test)["accuracy"] == learned.metrics["accuracy"]
    plan = json.loads((learned.path / "plan.json").read_text())
    assert plan["statistics"]["test"]["choices"] == {"2": 8, "3": 8, "4": 8}
    rows = learned.predict(str(test))
    targets = [row["label"] for row in make_rows(24, 2, (2, 3, 4))]
    assert (
        np.mean([row["label"] == target for row, target in zip(rows, targets)]) == learned.metrics["accuracy"]
    )
    assert all(row["choices"][row["label"]] == row["answer"] for row in rows)
    done = command("predict", learned.path, "the here", "a hammer", "an apple", "my dog")
    assert done.status == 0 and done.out.startswith("an apple\t") and done.out.endswith("\tthe here\n")
    assert learned.predict([("the here", ["a hammer", "an apple"])])[0]["label"] == 1
    done = command("predict", learned.path, "the here", "a hammer")
    assert done.status == 1 and "QUESTION CHOICE CHOICE" in done.err
    done = command("evaluate", learned.path, "--data", test)
    assert done.status == 0 and "accuracy" in done.out


def test_plan_and_the_pooled_head(short_bert, tmp_path, command):
    rows = [
        {"prompt": r["question"], **dict(zip("AB", r["choices"])), "answer": "AB"[r["label"]]}
        for r in make_rows(24, 3, (2,))
    ]
    path = write_csv(tmp_path / "train.csv", rows)
    words = [
        "--model",
        short_bert,
        "--task",
        "choice",
        "--train",
        path,
        "--method",
        "head(pooling='mean')",
        "train.precision=fp32",
    ]
    plan = json.loads(command("plan", *words, "--json").out)
    assert plan["trained_parameters"] == 33 and plan["rows"] == 22
    done = command("tune", *words, "--out", tmp_path / "run", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["metrics"]["rows"] == 2


def test_two_choices_in_bf16_pass_the_audit(short_bert, tmp_path):
    """Only the difference of two scores counts, so the head's bias has no gradient of its own."""
    run = graftkit.tune(
        model=str(short_bert), task="choice", train=make_rows(32, 5, (2,)), eval=None, method="full(lr=0.001) + head()",
        out=tmp_path / "run", settings={"train.precision": "bf16", "train.batch_size": 8, "train.epochs": 2.0},
    )  # fmt: skip
    assert run.result["steps"] == 8


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(short_bert, tmp_path, monkeypatch):
    import graftkit.runs.monitor

    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, make_rows(40, 7, (2, 4)))))
    given = {
        "model": str(short_bert), "task": "choice", "train": tmp_path / "train.jsonl",
        "method": "lora(rank=2, dropout=0.1) + head()",
        "settings": {**FAST, "train.steps": 5, "train.checkpoint_every": 1},
    }  # fmt: skip
    whole = graftkit.tune(**given, out=tmp_path / "whole")
    plain = graftkit.runs.monitor.Watch.log

    def log(self, step):
        plain(self, step)
        if step.number == 2:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patch:
        patch.setattr(graftkit.runs.monitor.Watch, "log", log)
        with pytest.raises(Interrupted):
            graftkit.tune(**given, out=tmp_path / "run")
    resumed = graftkit.resume(tmp_path / "run")
    assert (
        equal_bits(graft_tensors(resumed.path), graft_tensors(whole.path))
        and resumed.metrics == whole.metrics
    )


@pytest.mark.slow
@pytest.mark.usefixtures("few_compared")
def test_an_exported_model_scores_the_same(learned, command, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    done = command("export", learned.path, "--to", tmp_path / "model", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["largest_difference"] < 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    question, choices = "the here", ["a hammer", "an apple", "my dog"]
    given = tokenizer([question] * 3, choices, return_tensors="pt", padding=True)
    with torch.no_grad():
        chances = model(**given).logits[:, 0].softmax(0)
    assert chances.tolist() == pytest.approx(
        learned.predict([(question, choices)])[0]["probabilities"], abs=1e-3
    )


def test_what_predict_is_given():
    task, pair = Choice(), {"question": "question", "choices": "choices"}
    alone = {"choices": "choices"}
    assert task.given(["q", "a", "b"], pair) == [{"question": "q", "choices": ["a", "b"]}]
    assert task.given([("q", ["a", "b"])], pair) == [{"question": "q", "choices": ["a", "b"]}]
    assert task.given(["a", "b"], alone) == [{"choices": ["a", "b"]}] == task.given([["a", "b"]], alone)
    assert task.given([{"question": "q"}], pair) is None
    for items, columns, said in (
        (["q", "a"], pair, "2 texts are given, but a choice needs at least 3"),
        ([], pair, "nothing to choose from"),
        (["q", "a"], {**pair, "context": "context"}, "with a context"),
    ):
        with pytest.raises(UserError, match=said):
            task.given(items, columns)


def test_read_choices_keeps_names():
    assert read_choices({"text": ["a", "b"], "label": [1, 2]}) == (["a", "b"], ["1", "2"])
