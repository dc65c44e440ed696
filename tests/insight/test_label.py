"""`graftkit label`: which rows to label next, and labels to correct."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from conftest import KINDS, make_rows, write_csv

import graftkit
from graftkit.errors import UserError
from graftkit.insight.choosing import choose, uncertainty_of
from graftkit.insight.knn import directions


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pool(tmp_path_factory, rows_folder):
    """60 rows without labels, of which the last two are training rows, and one is there twice."""
    rows = [{"utterance": row["text"]} for row in make_rows(57, 9)]
    known = read(rows_folder / "train.csv")
    rows += [rows[0], {"utterance": f"  {known[4]['text']} "}, {"utterance": known[7]["text"]}]
    return write_csv(tmp_path_factory.mktemp("pool") / "pool.csv", rows)


@pytest.fixture(scope="module")
def clouds():
    """Three groups of 60, 30 and 10 rows on a sphere, and their numbers."""
    draw = np.random.default_rng(0)
    sizes = (60, 30, 10)
    group = np.repeat(range(3), sizes)
    points = draw.normal(size=(100, 16)) * 0.15 + np.eye(16)[group]
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), group


def test_without_labels_rows_are_typical_of_the_largest_groups(clouds):
    points, group = clouds
    chosen = choose(points, 3)
    assert [group[row] for row in chosen] == [0, 1, 2]
    for row in chosen:  # nearer to the middle of their group than most
        others = points[group == group[row]]
        center = others.mean(0)
        assert points[row] @ center >= np.sort(others @ center)[-len(others) // 4]
    assert [group[row] for row in choose(points, 2, labelled=points[:5])] == [1, 2]


def test_it_is_the_greedy_maximum_of_the_function_that_it_names(clouds):
    points, _ = clouds
    draw = np.random.default_rng(1)
    unsure, held = draw.random(100), points[[3, 70]]
    near, chosen = points @ points.T, []
    covered = np.maximum(near[[3, 70]].max(0), 0)
    free = (points @ held.T).max(1) < 0.95
    for _ in range(6):
        gains = (np.maximum(near - covered, 0) @ unsure) * unsure**2
        allowed = free & ~(near[:, chosen] >= 0.95).any(1)
        chosen.append(int(np.where(allowed, gains, -1).argmax()))
        covered = np.maximum(covered, near[chosen[-1]])
    assert choose(points, 6, unsure, held) == chosen


def test_near_duplicates_are_not_chosen(clouds):
    points, _ = clouds
    twice = np.concatenate([points[:4], points[:4], points[:1] + 1e-3])
    chosen = choose(directions(twice), 9)
    assert len(chosen) == 4 and len({row % 4 for row in chosen}) == 4


def test_how_unsure_answers_are():
    assert uncertainty_of([{"label": "a", "probability": 0.75}]).tolist() == [0.25]
    sets = [{"labels": ["a"], "probabilities": {"a": 0.9, "b": 0.4}}]
    assert uncertainty_of(sets) == pytest.approx([0.8])
    assert uncertainty_of([{"value": 3.0}]) is None


def test_next_with_a_model_and_labelled_rows(tiny_bert, rows_folder, pool, command, tmp_path):
    words = ("--pool", pool, "--model", tiny_bert, "--train", rows_folder / "train.csv")
    done = command("label", "next", 8, *words, "train.precision=fp32", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert len({row["row"] for row in found["rows"]}) == 8
    assert [one["row"] for one in found["overlap"]] == [58, 59]
    assert found["overlap"][0]["train"].endswith("train.csv, line 6")
    assert "2 rows of the pool are among the labelled rows and left out" in done.err
    given = read(pool)
    filled = read(tmp_path / "label-next.csv")
    for row, line in zip(found["rows"], filled):
        assert given[row["row"]]["utterance"] == row["text"] == line["utterance"]
        assert row["line"] == row["row"] + 2 and row["label"] in ("fruit", "tool") and line["label"] == ""
        assert line["suggested"] == row["label"]
        assert row["uncertainty"] == pytest.approx(1 - row["probability"], abs=1e-3)
    again = command("label", "next", 8, *words, "--json")
    assert again.status == 1 and "label-next.csv exists" in again.err


def test_next_without_labels(tiny_bert, pool):
    found = graftkit.label_next(pool, 5, model=tiny_bert)
    assert len(found["rows"]) == 5 and set(found["rows"][0]) == {"row", "file", "line", "text"}
    with pytest.raises(UserError, match="learns labels from a run or from labelled rows"):
        graftkit.label_suggest(pool, model=tiny_bert)


def test_a_run_suggests_what_it_predicts(finished, pool, command, tmp_path):
    done = command(
        "label", "suggest", "--pool", pool, "--run", finished, "--out", tmp_path / "to.jsonl", "--json"
    )
    assert done.status == 0, done.err
    found = json.loads(done.out)["rows"]
    lines = [json.loads(line) for line in (tmp_path / "to.jsonl").read_text().splitlines()]
    assert len(found) == len(lines) == 58
    assert sorted(row["probability"] for row in found) == [row["probability"] for row in found]
    predicted = {answer["row"]: answer for answer in graftkit.Run(finished, {}).predict(pool)}
    for row, line in zip(found, lines):
        assert line["label"] == line["suggested"] == predicted[row["line"]]["label"] == row["label"]
        assert row["probability"] == pytest.approx(predicted[row["line"]]["probability"], abs=1e-3)
    chosen = graftkit.label_next(pool, 4, run=finished)
    assert len(chosen["rows"]) == 4 and len(chosen["overlap"]) == 2


def test_rows_that_repeat_one_of_the_pool_are_left_out(tiny_bert, tmp_path):
    same = write_csv(
        tmp_path / "same.csv", [{"text": text} for text in ("a plum", "the saw", "a  plum", "a plum ")]
    )
    found = graftkit.label_next(same, 4, model=tiny_bert)
    assert sorted(row["row"] for row in found["rows"]) == [0, 1]
    assert (
        "2 rows of the pool repeat an earlier one" in found["notes"][0]
        and "the pool has no others" in found["notes"][1]
    )
    alike = write_csv(tmp_path / "alike.csv", [{"text": "a plum"}] * 3)
    assert len(graftkit.label_next(alike, 4, model=tiny_bert)["rows"]) == 1


def test_texts_to_tag_next(tiny_bert, command, tmp_path):
    def tagged(rows: list) -> list[dict]:
        return [
            {"tokens": row["text"].split(), "tags": ["B-F" if word in KINDS["fruit"] else "O" for word in row["text"].split()]}
            for row in rows
        ]  # fmt: skip

    train = tagged(make_rows(30, 1))
    pool = [{"tokens": row["tokens"]} for row in tagged(make_rows(20, 2))]
    pool.append({"tokens": [word for row in pool[:8] for word in row["tokens"]]})  # is read in parts
    settings = {"data.max_length": 24, "train.precision": "fp32", "train.steps": 3}
    run = graftkit.tune(
        model=str(tiny_bert),
        task="tag",
        train=train,
        eval=None,
        method="head()",
        out=tmp_path / "run",
        settings=settings,
    )
    found = graftkit.label_next(pool, 6, run=run.path)
    answers = run.predict(pool)
    for row in found["rows"]:
        probabilities = np.array(answers[row["row"]]["probabilities"])
        assert row["tags"] == answers[row["row"]]["tags"] and row["tokens"] == pool[row["row"]]["tokens"]
        assert row["uncertainty"] == pytest.approx(1 - np.exp(np.log(probabilities).mean()), abs=1e-3)
    assert len(found["rows"]) == 6 and found["label"] == "tags"
    alone = graftkit.label_next(
        pool, 6, model=tiny_bert, task="tag", train=train, settings={"data.max_length": 24}
    )
    assert (
        len(alone["rows"]) == 6
        and "a finished run does" in " ".join(alone["notes"])
        and "tags" not in alone["rows"][0]
    )
    (tmp_path / "pool.conll").write_text("a\nplum\n\nthe\nsaw\n")
    done = command(
        "label",
        "next",
        2,
        "--pool",
        tmp_path / "pool.conll",
        "--run",
        run.path,
        "--out",
        tmp_path / "next.jsonl",
    )
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "next.jsonl").read_text().splitlines()]
    assert {tuple(line["tokens"]) for line in lines} == {("a", "plum"), ("the", "saw")}
    assert all(
        line["tags"] == "" and len(line["suggested"]) == 2 and 0 < line["uncertainty"] < 1 for line in lines
    )


def test_pools_that_cannot_be_used(tiny_bert, rows_folder, finished, pool, tmp_path):
    numbers = write_csv(tmp_path / "numbers.csv", [{"id": i, "count": i % 7} for i in range(20)])
    train = rows_folder / "train.csv"
    for given in ({"model": tiny_bert, "train": train}, {"run": finished}, {"model": tiny_bert}):
        with pytest.raises(UserError, match=r"numbers\.csv.*text"):
            graftkit.label_next(numbers, 5, **given)
    labels = write_csv(tmp_path / "labels.csv", [{"category": f"kind {i % 3}"} for i in range(20)])
    with pytest.raises(
        UserError, match=r"labels\.csv has no column for the text: 'category' is a column of labels"
    ):
        graftkit.label_next(labels, 5, model=tiny_bert)
    with pytest.raises(UserError, match=r"all rows of .*train\.csv are among the labelled rows"):
        graftkit.label_next(train, 5, model=tiny_bert, train=train)
    with pytest.raises(UserError, match="must be at least 1"):
        graftkit.label_next(pool, 0, model=tiny_bert)
    with pytest.raises(UserError, match="name a finished run"):
        graftkit.label_next(pool, 5)
    with pytest.raises(UserError, match="give --run alone"):
        graftkit.label_next(pool, 5, run=finished, train=train)
    with pytest.raises(UserError, match=r"span\(\) has answers within its rows"):
        graftkit.label_next(pool, 5, model=tiny_bert, task="span")
    with pytest.raises(UserError, match=r"tag\(\) has answers within its rows"):
        graftkit.label_suggest(pool, model=tiny_bert, task="tag", train=train)
