"""classify with sets of labels, labels with an order, and numbers: rows, runs, answers, export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KINDS, equal_bits, graft_tensors, make_rows, write_csv
from killing import killed
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import graftkit
from graftkit.data.columns import find_columns
from graftkit.data.read import read_table
from graftkit.errors import UserError
from graftkit.tasks.classify.task import Classify

pytestmark = [pytest.mark.sampled, pytest.mark.usefixtures("few_compared")]

COLUMNS = {"text": "text", "label": "label"}
FAST = {"train.precision": "fp32", "train.batch_size": 16, "train.lr": 0.02}
WORDS = {word: kind for kind, words in KINDS.items() for word in words}


def rows_of(kind: str, count: int, seed: int = 0) -> list[dict]:
    """Sets: the kinds of the words in a text. Order: how long it is. Number: the same, a hundred times."""
    rows = make_rows(count, seed, tuple(KINDS))
    others = make_rows(count, seed + 1, ("fruit", "tool"))
    found = []
    for i, (row, other) in enumerate(zip(rows, others)):
        text = row["text"] if i % 3 else f"{row['text']} {other['text']}"
        if i % 7 == 3:
            text = "the very old and new"
        kinds = sorted({WORDS[word] for word in text.split() if word in WORDS})
        length = len(text.split())
        steps = ["short", "middle", "long"][min(2, length // 6)]
        label = {"multi": "; ".join(kinds), "ordinal": steps, "regression": f"{100 * length}"}[kind]
        found.append({"text": text, "label": label})
    return found


TASKS = {
    "multi": "classify(kind='multi')",
    "ordinal": "classify(kind='ordinal', order=['short', 'middle', 'long'])",
    "regression": "classify(kind='regression')",
}


def tune(
    kind: str, model: Path, folder: Path, method: str = "lora(rank=4) + head()", **settings
) -> graftkit.Run:
    return graftkit.tune(
        model=str(model), task=TASKS[kind], method=method, out=folder / "run",
        train=write_csv(folder / "train.csv", rows_of(kind, 64)), eval=write_csv(folder / "eval.csv", rows_of(kind, 40, 9)),
        settings={**FAST, "train.epochs": 10.0, **settings},
    )  # fmt: skip


def parsed(values: list, task: Classify, skip_bad: bool = False):
    table = read_table({"text": ["x"] * len(values), "label": values}, name="train")
    labels = task.label_names(table, COLUMNS, skip_bad)
    return labels, task.examples(table, COLUMNS, labels, skip_bad)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (["a; b", "", "b", "c ;a"], {}),
        (["a|b", "", "b", "c|a"], {}),
        (["a,b", "", "b", "c,a"], {}),
        (["a b", "", "b", "c  a"], {"separator": " "}),
        ([["a", "b"], [], ["b"], ("c", "a")], {}),
        (['["a", "b"]', "[]", "['b']", "['c','a']"], {}),
    ],
)
def test_sets_of_labels(values, options):
    if options.get("separator") == " ":
        with pytest.raises(UserError, match="separator is empty"):
            Classify(kind="multi", **options)
        return
    labels, examples = parsed(values, Classify(kind="multi", **options))
    assert labels == ("a", "b", "c")
    assert examples.targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_a_separator_that_is_named_is_the_only_one():
    labels, _ = parsed(["x, y / z", "z", "x, y"], Classify(kind="multi", separator="/"))
    assert labels == ("x, y", "z")


def test_columns_of_zero_and_one():
    table = read_table(
        {"text": list("wxyz"), "rude": [1, 0, "1", 0.0], "loud": ["0", True, "yes", "no"]}, name="train"
    )
    task = Classify(kind="multi", indicators=["rude", "loud"])
    assert find_columns(table, task.columns, {}) == {"text": "text"}
    labels = task.label_names(table, {"text": "text"}, False)
    examples = task.examples(table, {"text": "text"}, labels, False)
    assert labels == ("rude", "loud") and examples.targets.tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    bad = read_table({"text": ["x", "y"], "rude": [0, 2], "loud": [1, 1]}, name="train")
    with pytest.raises(UserError, match=r"row 2: column 'rude' is 2, which is neither 0 nor 1"):
        task.examples(bad, {"text": "text"}, labels, False)
    with pytest.raises(
        UserError, match=r"'loudd', one of the indicators, is not in train.*Did you mean 'loud'"
    ):
        Classify(kind="multi", indicators=["rude", "loudd"]).label_names(table, {"text": "text"}, False)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["", [], " "], "has no labels"),
        (["a;b", "b;a", "b; a"], "all rows of train .* have the same labels"),
        (["a", None, "b"], r"row 2: column 'label' is missing; for no labels write \[\]"),
        (["a", {"a": 1}, "b"], "row 2: column 'label' is a dict"),
        ([f"label {i}" for i in range(60)], "does not look like sets of labels"),
    ],
)
def test_sets_that_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        parsed(values, Classify(kind="multi"))


def test_a_label_that_training_did_not_have():
    task = Classify(kind="multi")
    table = read_table({"text": ["x", "y"], "label": ["a;q", "b"]}, name="test")
    with pytest.raises(UserError, match=r"test \(in memory\), row 1: label 'q' is not among the 2 labels"):
        task.examples(table, COLUMNS, ("a", "b"), False)
    assert len(task.examples(table, COLUMNS, ("a", "b"), True)) == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["1", "x", "3"], r"row 2: column 'label' is 'x', not a number"),
        ([1.0, 2.0, float("inf")], r"row 3: column 'label' is inf; a finite number is needed"),
        (["1", "nan", "3"], "row 2: column 'label' is 'nan'; a finite"),
        ([1, None, 3], "row 2: column 'label' is empty"),
    ],
)
def test_numbers_that_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        parsed(values, Classify(kind="regression"))
    labels, examples = parsed(values, Classify(kind="regression"), skip_bad=True)
    assert labels == () and len(examples) == 2 and len(examples.skipped) == 1


def test_numbers_that_are_all_the_same():
    _, examples = parsed([2.5, 2.5, 2.5], Classify(kind="regression"))
    with pytest.raises(UserError, match=r"the same number \(2.5\), so there is nothing to learn"):
        Classify(kind="regression").resolve(examples, (), 0)


def test_the_units_of_numbers_are_kept():
    _, examples = parsed([1, 2, 6], Classify(kind="regression"))
    task = Classify(kind="regression").resolve(examples, (), 0)
    assert (task.center, task.scale) == pytest.approx((3, np.std([1, 2, 6])))
    assert Classify(kind="regression", scale=2).resolve(examples, (), 0).scale == 2
    assert task.answers([np.array([0.0], np.float32)], None, ())[0]["value"] == 3


def test_labels_with_an_order():
    assert parsed(["10", "9", "1"] * 3, Classify(kind="ordinal"))[0] == ("1", "9", "10")
    task = Classify(kind="ordinal", order=["bad", "fair", "good"])
    labels, examples = parsed(["good", "bad", "bad"], task)
    assert labels == ("bad", "fair", "good") and examples.targets.tolist() == [2, 0, 0]
    with pytest.raises(UserError, match="their order has to be given"):
        parsed(["good", "bad"] * 3, Classify(kind="ordinal"))
    with pytest.raises(UserError, match="only one class"):
        parsed(["3", "3"], Classify(kind="ordinal"))
    with pytest.raises(
        UserError, match=r"row 1: label 'god' is not among the 3 labels of classify\(order=...\).*mean 'good'"
    ):
        parsed(["god", "bad"], task)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 0.3}, "threshold is for kind='multi', but kind is 'single'"),
        (
            {"kind": "regression", "class_weights": "balanced"},
            "class_weights is for kind='single' or kind='multi' or kind='ordinal'",
        ),
        ({"kind": "regression", "order": ["a", "b"]}, "order is for kind='ordinal'"),
        ({"kind": "ordinal", "order": ["a"]}, "order has 1 name; at least two"),
        ({"kind": "ordinal", "order": ["a", "b", "a"]}, "order lists 'a' more than once"),
        ({"kind": "multi", "threshold": 1.0}, "must be below 1"),
        ({"kind": "regresion"}, "Did you mean 'regression'"),
    ],
)
def test_options_that_do_not_fit(options, said):
    with pytest.raises(UserError, match=said):
        Classify(**options)


def test_each_label_is_on_both_sides():
    random = np.random.default_rng(0)
    sets = [
        [name for name, share in zip("abc", (0.5, 0.2, 0.04)) if random.random() < share] for _ in range(200)
    ]
    _, examples = parsed(sets, Classify(kind="multi"))
    for seed in range(3):
        kept, held = Classify(kind="multi").hold_out(examples, 0.1, seed)
        assert sorted([*kept, *held]) == list(range(200)) and len(held) == pytest.approx(20, abs=3)
        shares = examples.targets[held].sum(0) / examples.targets.sum(0)
        assert shares == pytest.approx([0.1, 0.1, 0.1], abs=0.06)
    assert Classify(kind="multi").hold_out(examples, 0.1, 0) == Classify(kind="multi").hold_out(
        examples, 0.1, 0
    )


def test_each_part_of_the_range_is_on_both_sides():
    _, examples = parsed([float(i * i) for i in range(100)], Classify(kind="regression"))
    kept, held = Classify(kind="regression").hold_out(examples, 0.1, 1)
    assert sorted([*kept, *held]) == list(range(100)) and [row // 10 for row in held] == list(range(10))
    for share in (0.02, 0.5, 0.9):
        kept, held = Classify(kind="regression").hold_out(examples, share, 1)
        assert kept and held and sorted([*kept, *held]) == list(range(100))


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_learns_answers_and_is_evaluated(tiny_bert, tmp_path, command, kind):
    run = tune(kind, tiny_bert, tmp_path)
    found = run.metrics
    good = {
        "multi": ("f1", 0.5),
        "ordinal": ("quadratic_weighted_kappa", 0.4),
        "regression": ("pearson", 0.4),
    }[kind]
    assert found[good[0]] > good[1], found
    assert run.evaluate(tmp_path / "eval.csv") == found
    answers = run.predict(tmp_path / "eval.csv")
    assert len(answers) == 40 and answers[0]["row"] == 2
    rows = rows_of(kind, 40, 9)
    if kind == "multi":
        right = [row["label"] == "; ".join(answer["labels"]) for row, answer in zip(rows, answers)]
        assert np.mean(right) == found["accuracy"] == found["exact_match"]
        assert set(answers[0]["probabilities"]) == set(KINDS)
        asked = command("predict", run.path, "the old plum", "--option", "threshold=0.000001", "--json")
        assert json.loads(asked.out)["predictions"][0]["labels"] == sorted(KINDS)
    elif kind == "ordinal":
        assert np.mean([r["label"] == a["label"] for r, a in zip(rows, answers)]) == found["accuracy"]
    else:
        errors = [float(row["label"]) - answer["value"] for row, answer in zip(rows, answers)]
        assert np.mean(np.square(errors)) == pytest.approx(found["loss"], rel=1e-3)
    printed = command("predict", run.path, "the old plum")
    assert printed.status == 0 and printed.out.rstrip().endswith("the old plum")
    evaluated = command("evaluate", run.path, "--data", tmp_path / "eval.csv")
    assert evaluated.status == 0 and "Worst examples" in evaluated.out
    planned = command("plan", run.path / "recipe.yaml")
    assert planned.status == 0, planned.err
    statistics = json.loads((run.path / "plan.json").read_text())["statistics"]["train"]
    assert ("values" in statistics) == (kind == "regression") and ("labels" in statistics) != (
        kind == "regression"
    )
    worst = [json.loads(line) for line in (run.path / "worst.jsonl").read_text().splitlines()]
    assert worst == [] or worst[0]["loss"] == max(row["loss"] for row in worst)


TEXTS = ["the old hammer", "a very new plum and my cat is here", "of the"]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.slow
def test_export_of_the_own_head(tiny_bert, tmp_path, kind):
    run = tune(kind, tiny_bert, tmp_path, **{"train.epochs": 2.0})
    found = run.export(tmp_path / "plain")
    assert found["largest_difference"] < 1e-4 and found["outputs"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    ours, config = run.predict(TEXTS), model.config
    problem, names, about = config.problem_type, config.id2label, getattr(config, "graftkit", None)
    if kind == "multi":
        assert problem == "multi_label_classification" and list(names.values()) == sorted(KINDS)
        for row, answer in zip(logits.sigmoid(), ours):
            assert list(answer["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-3)
    elif kind == "regression":
        assert problem == "regression"
        values = logits[:, 0] * about["scale"] + about["center"]
        assert [answer["value"] for answer in ours] == pytest.approx(values.tolist(), rel=1e-4)
    else:
        assert problem is None and names == {0: "above short", 1: "above middle"}
        places = (logits.sigmoid().cumprod(dim=1) > 0.5).sum(dim=1)
        assert [answer["label"] for answer in ours] == [about["labels"][place] for place in places]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.slow
def test_export_of_a_pooled_head(tiny_bert, tmp_path, kind):
    run = tune(kind, tiny_bert, tmp_path, "head(pooling='mean')", **{"train.epochs": 2.0})
    run.export(tmp_path / "plain")
    script = tmp_path / "plain" / "classifier.py"
    space = {"__name__": "classifier", "__file__": str(script)}
    exec(compile(script.read_text(encoding="utf-8"), "classifier.py", "exec"), space)
    answers = space["Classifier"](tmp_path / "plain")(TEXTS)
    for answer, ours in zip(answers, run.predict(TEXTS), strict=True):
        if kind == "regression":
            assert answer == pytest.approx(ours["value"], rel=1e-4)
        else:
            assert answer == ours["labels" if kind == "multi" else "label"]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_end(short_bert, tmp_path, command, kind):
    train = write_csv(tmp_path / "train.csv", rows_of(kind, 48))

    def words(out: Path) -> list[str]:
        return [
            "tune", "--model", str(short_bert), "--task", TASKS[kind], "--train", str(train), "--eval", "0.2",
            "--method", "lora(rank=2, dropout=0.1) + head()", "--out", str(out), "train.steps=5", "train.batch_size=8",
            "train.precision=fp32", "train.checkpoint_every=1", "train.evaluate_every=end",
        ]  # fmt: skip

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(*words(whole)).status == 0
    killed("after-rename", 3, words(stopped))
    done = command("tune", "--resume", stopped)
    assert done.status == 0, done.err
    assert equal_bits(graft_tensors(whole), graft_tensors(stopped))
    results = [json.loads((folder / "result.json").read_text())["metrics"] for folder in (whole, stopped)]
    assert results[0] == results[1]


def test_indicators_in_a_run(tiny_bert, tmp_path):
    rows = [
        {"text": row["text"], **{kind: int(kind in row["label"]) for kind in KINDS}}
        for row in rows_of("multi", 40)
    ]
    run = graftkit.tune(
        model=str(tiny_bert), task={"classify": {"kind": "multi", "indicators": list(KINDS), "threshold": 0.4}}, train=rows,
        eval=0.2, method="head(pooling='mean')", out=tmp_path / "run", settings={**FAST, "train.steps": 4},
    )  # fmt: skip
    assert list(run.metrics["per_class"]) == list(KINDS) and run.evaluate(rows)["rows"] == 40
    assert set(run.predict(["a plum"])[0]) == {"text", "labels", "probabilities"}


def test_pairs_with_a_score(tiny_bert, tmp_path):
    rows = [
        {"sentence1": row["text"], "sentence2": "the saw", "score": len(row["text"])} for row in make_rows(32)
    ]
    run = graftkit.tune(
        model=str(tiny_bert), task=TASKS["regression"], train=rows, eval=0.25, method="head(pooling='mean')",
        out=tmp_path / "run", settings={**FAST, "train.steps": 4},
    )  # fmt: skip
    assert np.isfinite(run.metrics["loss"]) and isinstance(
        run.predict([("a plum", "the saw")])[0]["value"], float
    )


def test_smoothing_of_a_number_is_refused(tiny_bert, tmp_path):
    with pytest.raises(UserError, match="a regression has no classes; leave it out"):
        tune("regression", tiny_bert, tmp_path, **{"train.label_smoothing": 0.1})
    assert not list(tmp_path.glob("run*"))
