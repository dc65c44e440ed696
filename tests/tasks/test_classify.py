"""The classification task: labels, class weights, losses, and every way to hand over rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import equal_bits, graft_tensors, make_rows, tune_words, write_csv
from sklearn.utils.class_weight import compute_class_weight

import graftkit
from graftkit.data.read import read_table
from graftkit.errors import UserError
from graftkit.tasks.classify.task import Classify
from graftkit.tasks.shared.labels import cross_entropy

COLUMNS = {"text": "text", "label": "label"}
SETTINGS = {"train.precision": "fp32", "train.batch_size": 16, "train.lr": 0.01, "train.steps": 4}


def tables(rows: list[dict]):
    import datasets
    import pandas

    frame = pandas.DataFrame(rows)
    return {
        "list of dicts": rows,
        "dict of lists": {name: [row[name] for row in rows] for name in rows[0]},
        "datasets.Dataset": datasets.Dataset.from_list(rows),
        "data frame": frame,
    }


def test_balanced_weights_equal_scikit_learn():
    targets = np.array([0] * 70 + [1] * 20 + [2] * 10)
    weights = Classify(class_weights="balanced").form.class_weight(np.bincount(targets), "abc")
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets)
    assert weights.tolist() == pytest.approx(expected.tolist())
    assert weights[torch.from_numpy(targets)].mean().item() == pytest.approx(1)
    assert Classify().form.class_weight(np.bincount(targets), "abc") is None


def test_a_class_that_was_held_out_entirely_gets_a_finite_weight():
    assert torch.isfinite(
        Classify(class_weights="balanced").form.class_weight(np.array([2, 0, 1]), "abc")
    ).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses(smoothing):
    """(1 - s) * -log p[target] + s * mean of -log p, times the weight of the class."""
    logits, targets = (
        torch.randn(6, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    logs = logits.log_softmax(1)
    expected = -(1 - smoothing) * logs[range(6), targets] - smoothing * logs.mean(1)
    assert torch.allclose(cross_entropy(logits, targets, smoothing), expected)
    weights = torch.tensor([0.5, 1.0, 3.0])
    weighed = cross_entropy(logits, targets, smoothing, weights)
    assert torch.allclose(weighed, expected * weights[targets])


def test_answers_are_the_likeliest_with_their_probability():
    logits = np.array([[1.0, 3.0, 0.0], [1000.0, 0.0, 0.0]], dtype=np.float32)
    expected = torch.tensor(logits).softmax(1)
    answers = Classify().answers(list(logits), None, ("a", "b", "c"))
    assert [answer["label"] for answer in answers] == ["b", "a"]
    assert answers[0]["probability"] == pytest.approx(expected[0, 1].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "c"] * 4, ("a", "b", "c")),
        (["10", "9", "1"] * 4, ("1", "9", "10")),
        ([10, 9, 1.0] * 4, ("1", "9", "10")),
        ([True, False] * 6, ("False", "True")),
        ([" a", "a ", "b"] * 4, ("a", "b")),
    ],
)
def test_label_names(values, expected):
    table = read_table({"text": ["x"] * len(values), "label": values})
    assert Classify().label_names(table, COLUMNS, False) == expected
    examples = Classify().examples(table, COLUMNS, expected, False)
    assert [expected[i] for i in examples.targets] == [
        str(v if v != 1.0 or v is True else 1).strip() for v in values
    ]


def test_bad_rows_are_named_or_counted():
    table = read_table({"text": ["x", "", "y", None], "label": ["a", "a", " ", "b"]}, name="train")
    with pytest.raises(UserError, match=r"train \(in memory\), row 2: column 'text' is empty"):
        Classify().examples(table, COLUMNS, ("a", "b"), False)
    examples = Classify().examples(table, COLUMNS, ("a", "b"), True)
    assert len(examples) == 1 and len(examples.skipped) == 3
    with pytest.raises(UserError, match="no good rows"):
        Classify().examples(table.take([1, 2, 3]), COLUMNS, ("a", "b"), True)


def test_text_that_is_no_text():
    table = read_table({"text": [["a"], ["b"]], "label": ["a", "b"]})
    with pytest.raises(UserError, match="is a list, not a text"):
        Classify().examples(table, COLUMNS, ("a", "b"), False)


@pytest.mark.slow
def test_every_kind_of_table_in_memory_gives_the_run_of_the_file(tiny_bert, tmp_path):
    rows = make_rows(32, 7)
    source = write_csv(tmp_path / "t.csv", rows)
    file = graftkit.tune(
        model=str(tiny_bert), train=source, eval=0.25, method="head()", out=tmp_path / "f", settings=SETTINGS
    )
    for i, (name, table) in enumerate(tables(rows).items()):
        before = repr(table)
        run = graftkit.tune(
            model=str(tiny_bert),
            train=table,
            eval=0.25,
            method="head()",
            out=tmp_path / str(i),
            settings=SETTINGS,
        )
        assert equal_bits(graft_tensors(run.path), graft_tensors(file.path)), name
        assert repr(table) == before
    found = run.evaluate(rows[:10])
    assert found["rows"] == 10
    assert run.predict(["the saw", "a plum"])[1]["text"] == "a plum"
    assert [a["label"] for a in run.predict(rows[:4])] == [
        a["label"] for a in run.predict([r["text"] for r in rows[:4]])
    ]
    with pytest.raises(UserError, match="in memory"):
        (run.path / "result.json").unlink()
        from graftkit.runs.tune import resume

        resume(run.path)


def test_integer_labels_in_json_lines_and_parquet(tiny_bert, tmp_path):
    import pandas

    rows = [{"sentence": r["text"], "y": int(r["label"] == "tool") * 3} for r in make_rows(24)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "e.parquet")
    run = graftkit.tune(
        model=str(tiny_bert), train=tmp_path / "t.jsonl", eval=tmp_path / "e.parquet", method="head()",
        out=tmp_path / "run", settings=SETTINGS,
    )  # fmt: skip
    assert list(run.metrics["per_class"]) == ["0", "3"]
    assert run.predict(["the saw"])[0]["label"] in ("0", "3")


def test_tsv_with_mark_and_quotes_that_do_not_balance(tiny_bert, tmp_path):
    lines = ["text\tlabel", *(f'{r["text"]} "{i}\t{r["label"]}' for i, r in enumerate(make_rows(24)))]
    (tmp_path / "t.tsv").write_bytes("\ufeff".encode() + "\n".join(lines).encode())
    run = graftkit.tune(
        model=str(tiny_bert), train=tmp_path / "t.tsv", eval=None, method="head()", out=tmp_path / "run",
        settings={**SETTINGS, "data.eval": None},
    )  # fmt: skip
    assert run.metrics == {} and "24 training rows" in (run.path / "README.md").read_text()


@pytest.mark.slow
def test_pairs_of_texts(tiny_bert, rows_folder, tmp_path, command):
    words = tune_words(tiny_bert, rows_folder, tmp_path / "run", "train.steps=3", "--json")
    rows = rows_folder / "pairs.csv"
    done = command(
        *words,
        "--train",
        rows,
        "--eval",
        "0.2",
        "data.columns={text: text_pair, text_pair: text, label: label}",
    )
    assert done.status == 0
    answers = command("predict", tmp_path / "run", "--data", rows, "--json")
    first = json.loads(answers.out)["predictions"][0]
    table = read_table(rows)
    assert (first["text"], first["text_pair"]) == (table.columns["text_pair"][0], table.columns["text"][0])
    refused = command("predict", tmp_path / "run", "one text")
    assert refused.status == 1 and "give two, TEXT and TEXT_PAIR (got 1)" in refused.err
    typed = json.loads(command("predict", tmp_path / "run", first["text"], first["text_pair"], "--json").out)
    assert typed["predictions"] == [{k: v for k, v in first.items() if k != "row"}]
    run = graftkit.Run(tmp_path / "run", {})
    pair = (first["text"], first["text_pair"])
    assert run.predict([pair])[0]["label"] == first["label"]


def test_a_pair_is_encoded_as_the_model_was_trained(tiny_bert):
    from transformers import AutoTokenizer

    from graftkit.data.encode import encode_texts

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    encoded = encode_texts(tokenizer, ["the plum", "a saw"], ["the old saw", "my"], 64)
    batch = encoded.pad([1, 0])
    theirs = tokenizer(["a saw", "the plum"], ["my", "the old saw"], padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert (batch[name] == theirs[name]).all()
    assert set(batch["token_type_ids"].flatten().tolist()) == {0, 1}


@pytest.mark.slow
def test_class_weights_in_a_run(tiny_bert, tmp_path):
    rows = make_rows(48, 3)
    rows = [row for i, row in enumerate(rows) if row["label"] == "tool" or i % 12 == 0]
    plain, weighed = (
        graftkit.tune(
            model=str(tiny_bert), task=task, train=rows, eval=rows, method="head(pooling='mean')",
            out=tmp_path / str(i), settings={**SETTINGS, "train.steps": 40},
        ).metrics["per_class"]["fruit"]["recall"]
        for i, task in enumerate(("classify", "classify(class_weights='balanced')"))
    )  # fmt: skip
    assert weighed >= plain


def test_labels_that_are_no_numbers_have_an_order():
    for values in (["nan", "b", "10", "inf", "9", "a"], ["a", "9", "inf", "nan", "10", "b"]):
        table = read_table({"text": ["x"] * 12, "label": values * 2})
        assert Classify().label_names(table, COLUMNS, False) == ("9", "10", "a", "b", "inf", "nan")


@pytest.mark.parametrize(
    ("labels", "values", "expected"),
    [
        (("0", "1"), ["1.0", 1.0, 0, "0.00"], [1, 1, 0, 0]),
        (("0.0", "1.0"), [1, 0.0, "1.0", "0"], [1, 0, 1, 0]),
        (("False", "True"), ["true", True, "FALSE"], [1, 1, 0]),
        (("1", "1.0"), ["1.0", "1"], [1, 0]),
        (("True", "true"), ["true", True], [1, 0]),
    ],
)
def test_labels_of_other_kinds_of_files(labels, values, expected):
    table = read_table({"text": ["x"] * len(values), "label": values})
    assert Classify().examples(table, COLUMNS, labels, False).targets.tolist() == expected


def test_a_label_that_could_be_two_is_neither():
    table = read_table({"text": ["x"], "label": ["TRUE"]})
    with pytest.raises(UserError, match="not among"):
        Classify().examples(table, COLUMNS, ("True", "true"), False)


@pytest.mark.slow
def test_a_run_keeps_its_columns(tiny_bert, rows_folder, tmp_path):
    rows = make_rows(24)
    paired = [{**row, "pair": "the saw"} for row in rows]
    given = {"model": str(tiny_bert), "method": "head()", "settings": SETTINGS}
    single = graftkit.tune(train=rows, eval=paired, out=tmp_path / "single", **given)
    assert single.evaluate(paired) == single.evaluate(rows) == single.metrics
    answers = single.predict(paired)
    assert "text_pair" not in answers[0] and answers[0]["row"] == 1
    with pytest.raises(UserError, match="single texts"):
        single.predict([("a plum", "the saw")])
    with pytest.raises(UserError, match="pass a list"):
        single.predict("where is my card?")
    named = {**SETTINGS, "data.columns": {"text": "text"}}
    run = graftkit.tune(train=paired, eval=rows, out=tmp_path / "named", **{**given, "settings": named})
    assert run.evaluate(rows)["rows"] == 24

    with pytest.raises(UserError, match="no column 'text_pair'"):
        graftkit.tune(train=paired, eval=rows, out=tmp_path / "none", **given)
    pairs = graftkit.tune(train=paired, eval=None, out=tmp_path / "pairs", **given)
    for work in (pairs.evaluate, pairs.predict):
        with pytest.raises(UserError, match=r"no column 'text_pair'.*as 'pair'"):
            work([{**row, "notes": f"a long note {i}"} for i, row in enumerate(rows)])
