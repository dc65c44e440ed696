"""What a run notices in its rows, in result.json and in its report."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_rows, write_csv
from run_folders import write_run

from graftkit.insight.confidence_evidence import Evidence
from graftkit.recipe import schema as recipes
from graftkit.report.doubtful import doubtful_sections
from graftkit.report.finished import read_finished
from graftkit.report.page import run_page
from graftkit.runs.noticed import noticed
from graftkit.runs.prepare import prepare, prepare_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """40 training rows, of which row 30 is row 4 with the other label and row 31 row 5; 10 test rows, of which row 6 is
    training row 8."""
    folder = tmp_path_factory.mktemp("noticed")
    train = list({row["text"]: row for row in make_rows(80, 1)}.values())[:40]
    train[30] = {
        "text": f" {train[4]['text']}",
        "label": {"fruit": "tool", "tool": "fruit"}[train[4]["label"]],
    }
    train[31] = train[5]
    texts = {row["text"] for row in train}
    test = [row for row in make_rows(40, 2) if row["text"] not in texts][:10]
    test[6] = train[8]
    data = {
        name: str(write_csv(folder / f"{name}.csv", some))
        for name, some in (("train", train), ("test", test))
    }
    return prepare_rows(recipes.make({"model": "none", "data": {**data, "eval": None}}))


def test_rows_that_occur_twice_are_counted_with_those_of_another_answer_first(rows):
    within, across = noticed(rows, {}, {}, 1.0)["repeated"]
    assert (within["data"], within["of"], within["rows"], within["total"], within["other_answer"]) == (
        "train",
        "train",
        2,
        40,
        1,
    )
    first = within["shown"][0]
    assert (first["line"], first["of"]["line"], first["same_answer"]) == (32, 6, False)
    assert {first["label"], first["label_there"]} == {"fruit", "tool"} and first["text"].strip()
    assert (across["data"], across["of"], across["rows"], across["total"], across["other_answer"]) == (
        "test",
        "train",
        1,
        10,
        0,
    )
    told = " ".join(rows.warnings)
    assert (
        "1 training row repeats an earlier one with another answer" in told
        and "train.csv, line 32 = train.csv, line 6" in told
    )
    assert "LEAK: 1 of 10 test rows" in told


def test_a_plan_warns_of_them_in_json_too(rows, tiny_bert, command):
    words = [word for name, part in rows.parts.items() for word in (f"--{name}", part.table.source)]
    done = command("plan", "--model", tiny_bert, *words, "data.eval=null", "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)["warnings"]
    assert any("LEAK" in text for text in told) and any("with another answer" in text for text in told)


def test_labels_that_the_model_is_sure_are_others_come_worst_first(rows):
    targets = np.asarray(rows.test.targets)
    logits = np.zeros((10, 2), np.float32)
    logits[np.arange(10), targets] = 4.0
    for row, odds in ((3, 5.0), (7, 9.0), (5, 2.0)):  # of the other label; with row 5 it is not sure
        logits[row] = 0
        logits[row, 1 - targets[row]] = odds
    dataset = SimpleNamespace(examples=rows.test, example=int, about=lambda row, number: {})
    (found,) = noticed(
        rows, {"test": dataset}, {"test": Evidence(logits, targets, None, np.arange(10))}, 1.0
    )["suspects"]
    assert (found["data"], found["of"], found["judged"], found["count"]) == ("test", "rows", 10, 2)
    assert [one["line"] for one in found["shown"]] == [9, 5]
    assert [one["score"] for one in found["shown"]] == [
        round(1 / (1 + np.exp(-odds)), 4) for odds in (9.0, 5.0)
    ]
    first = found["shown"][0]
    assert first["given"] == rows.labels[targets[7]] and first["suggested"] == rows.labels[1 - targets[7]]
    cooler = noticed(rows, {"test": dataset}, {"test": Evidence(logits, targets, None, np.arange(10))}, 3.0)
    assert cooler["suspects"][0]["count"] == 1


def test_words_of_tagged_texts_are_named(tiny_bert):
    table = [
        {"tokens": ["plum", "hammer-fig", "and"], "tags": ["B-F", "O", "O"]},
        {"tokens": ["saw"] * 40, "tags": ["O"] * 40},
    ]
    recipe = recipes.make(
        {"model": str(tiny_bert), "task": "tag", "data": {"train": "x", "eval": None, "max_length": 20}}
    )
    tagged = prepare_rows(recipe, table)
    dataset = prepare(recipe, tagged, meta=True).train
    seen = []
    for row in range(len(dataset)):
        labels = dataset.targets(np.array([row]))[0].numpy()
        for number, label in enumerate(labels[labels >= 0]):
            example, word = dataset.example(row), dataset.about(row, number)
            at = [i for i, span in enumerate(dataset.spans[example]) if span == (word["start"], word["end"])]
            assert tagged.train.targets[example][at[0]] == label
            seen.append((example, at[0], word["word"]))
    assert seen[:3] == [(0, 0, "plum"), (0, 1, "hammer-fig"), (0, 2, "and")]
    assert sorted(seen[3:]) == [(1, i, "saw") for i in range(40)] and len(dataset) > 2


def test_a_report_shows_them_and_survives_what_was_edited(rows, tmp_path):
    folder = write_run(tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    suspect = {
        "file": "a/t.csv",
        "line": 3,
        "text": "<b>x</b>",
        "given": ["a", "b"],
        "suggested": "c",
        "score": 0.99,
    }
    words = {"data": "eval", "of": "words", "judged": 50, "count": 1,
             "shown": [{**suspect, "word": "Rome", "start": 0, "end": 4}]}  # fmt: skip
    found = {
        "repeated": noticed(rows, {}, {}, 1.0)["repeated"] + ["x", {"rows": 1}],
        "suspects": [
            {"data": "test", "of": "rows", "judged": 1200, "count": 7, "shown": [suspect, 4, {}]},
            words,
            None,
        ],
    }
    (folder / "result.json").write_text(json.dumps({**result, "noticed": found}))
    page = run_page(read_finished(folder))
    for told in ("Rows to check", "7 of 1,200 test rows", "t.csv, line 3, certainty 0.990", "&lt;b&gt;x", "Rome", "1 of 50 evaluation words",
                 "Training rows that occur twice", "1 of them with another answer", "train.csv, line 32 = train.csv, line 6",
                 "Test rows that are training rows too", "graftkit data check"):  # fmt: skip
        assert told in page, told
    for strange in (
        None,
        [],
        {"suspects": 3, "repeated": {}},
        {"suspects": [{"count": 1, "judged": 2, "shown": 4}]},
    ):
        (folder / "result.json").write_text(json.dumps({**result, "noticed": strange}))
        assert doubtful_sections(read_finished(folder)) == []
