"""Entities against conlleval.pl and seqeval, and tags of every scheme."""

from __future__ import annotations

import random

import numpy as np
import pytest
from conlleval import conlleval

from graftkit.tasks.tag.entities import (
    are_of_entities,
    bio,
    chunks,
    entity_scores,
    names_of,
    parse_tag,
    scheme_of,
    tag_scores,
    types_of,
)


def scored(wanted: list[list[str]], found: list[list[str]]) -> dict:
    types = sorted({kind for row in wanted + found for tag in row for kind in [parse_tag(tag)[1]] if kind})
    return entity_scores([chunks(row) for row in wanted], [chunks(row) for row in found], types)


def same(wanted: list[list[str]], found: list[list[str]]) -> None:
    got, expected = scored(wanted, found), conlleval(wanted, found)
    for name in ("precision", "recall", "f1"):
        assert got[name] == pytest.approx(expected[name]), name
    for kind, figures in expected["types"].items():
        row = got["per_class"][kind]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx(figures)


@pytest.mark.parametrize(
    ("wanted", "found", "right"),
    [
        ("B-a B-a", "B-a I-a", 0),  # adjacent entities of one type are two
        ("B-a B-a", "B-a B-a", 2),
        ("B-a I-a O", "I-a I-a O", 1),  # I without B begins one
        ("O I-a", "O B-a", 1),
        ("B-a I-b I-b", "B-a B-b I-b", 2),  # another type begins one
        ("B-a I-a I-a", "B-a I-a B-a", 0),
        ("I-a B-a", "B-a B-a", 2),  # IOB1
        ("B-a I-a", "B-b I-b", 0),
        ("O O", "O B-a", 0),
        ("B-a O", "O O", 0),
        ("B-a I-a O B-b", "B-a I-a O B-b", 2),
        ("I-a I-b I-a", "B-a B-b B-a", 3),
    ],
)
def test_tricky_cases_are_scored_as_by_conlleval(wanted, found, right):
    gold, guess = wanted.split(), found.split()
    assert len(set(chunks(gold)) & set(chunks(guess))) == right
    same([gold], [guess])


def drawn(seed: int, tags: list[str]) -> list[list[str]]:
    draw = random.Random(seed)
    return [draw.choices(tags, k=length) for length in (3, 1, 8, 12, 5, 30)]


@pytest.mark.parametrize("seed", range(25))
def test_any_tags_are_scored_as_by_conlleval(seed):
    tags = ["O", "B-a", "I-a", "B-b", "I-b", "O", "I-c"]
    wanted, found = drawn(seed, tags), drawn(seed + 100, tags)
    close = [[a if random.Random(f"{seed}{i}").random() < 0.7 else b for i, (a, b) in enumerate(zip(*rows))]
             for rows in zip(wanted, found)]  # fmt: skip
    same(wanted, found)
    same(wanted, close)


@pytest.mark.parametrize("seed", range(10))
def test_any_tags_are_scored_as_by_seqeval(seed):
    seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    from seqeval.metrics.sequence_labeling import get_entities

    for tags in (["O", "B-a", "I-a", "B-b", "I-b"], ["O", "B-a", "I-a", "E-a", "S-a", "S-b", "B-b", "E-b"]):
        wanted, found = drawn(seed, tags), drawn(seed + 100, tags)
        for row in wanted:
            assert [(kind, a, b - 1) for a, b, kind in chunks(row)] == get_entities(row)
        got = scored(wanted, found)
        assert got["f1"] == pytest.approx(seqeval.f1_score(wanted, found))
        assert got["macro_f1"] == pytest.approx(seqeval.f1_score(wanted, found, average="macro"))


@pytest.mark.parametrize(
    ("scheme", "tags"),
    [
        ("BIO", "B-a I-a B-a O B-b O B-a B-b"),
        ("IOB1", "I-a I-a B-a O I-b O I-a I-b"),
        ("BIOES", "B-a E-a S-a O S-b O S-a S-b"),
        ("BILOU", "B-a L-a U-a O U-b O U-a U-b"),
        ("BMES", "B-a M-a E-a O S-b O S-a S-b"),
    ],
)
def test_schemes_say_the_same(scheme, tags):
    row = tags.split()
    assert scheme_of([row]) == scheme
    expected = "B-a I-a I-a O B-b O B-a B-b" if scheme == "BMES" else "B-a I-a B-a O B-b O B-a B-b"
    assert bio(chunks(row), len(row)) == expected.split()
    assert are_of_entities(row)


def test_what_is_no_tag_of_entities():
    assert not are_of_entities(["NOUN", "VERB", "X", "O"])
    assert not are_of_entities(["NN", "IN", "-LRB-", "S-x"])
    assert are_of_entities(["O", "B", "I"]) and chunks(["B", "I", "B"]) == [(0, 2, ""), (2, 3, "")]
    assert parse_tag("X-a") is None and parse_tag("B-") is None and parse_tag("") is None
    assert types_of(names_of(["a", "b-c"])) == ("a", "b-c")
    assert types_of(("ADJ", "NOUN", "VERB")) == () and types_of(names_of([""])) == ("",)


def test_intervals_are_over_sentences():
    """A figure of a resample is that of the sentences drawn; those all alike leave nothing to chance."""
    alike = scored([["B-a", "O"]] * 50, [["B-a", "B-a"]] * 50)
    assert alike["f1_interval"] == [alike["f1"], alike["f1"]] == pytest.approx([2 / 3, 2 / 3])
    mixed = scored([["B-a"]] * 60, [["B-a"]] * 40 + [["O"]] * 20)
    low, high = mixed["f1_interval"]
    draw = np.random.default_rng(1)
    recalls = draw.binomial(60, 40 / 60, 4000) / 60
    expected = np.percentile(2 * recalls / (1 + recalls), [2.5, 97.5])
    assert [low, high] == pytest.approx(expected.tolist(), abs=0.02)


def test_other_tags_are_scored_as_by_scikit_learn():
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    draw = np.random.default_rng(0)
    wanted = [draw.integers(0, 4, size) for size in (3, 9, 20)]
    found = [np.where(draw.random(len(row)) < 0.6, row, draw.integers(0, 4, len(row))) for row in wanted]
    got = tag_scores(wanted, found, ("w", "x", "y", "z", "never"))
    whole = np.concatenate(wanted), np.concatenate(found)
    assert got["macro_f1"] == pytest.approx(f1_score(*whole, average="macro"))
    rows = zip(*precision_recall_fscore_support(*whole, labels=range(4)))
    for name, (precision, recall, f1, support) in zip("wxyz", rows):
        row = got["per_class"][name]
        assert row == pytest.approx({"precision": precision, "recall": recall, "f1": f1, "rows": support})
