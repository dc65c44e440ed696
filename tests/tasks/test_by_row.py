"""Metrics by row: their sums are the metrics that each task reports."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from graftkit.runs.prepare import make_task
from graftkit.tasks.tag.entities import by_sentence, chunks, entity_scores

LABELS = ("apple", "pear", "plum")


def outcomes(kind: str, rows: int = 50) -> tuple[list[np.ndarray], Any, tuple[str, ...]]:
    """Random outputs and targets of one kind of classification, and its labels."""
    random = np.random.default_rng(3)
    targets = {
        "single": random.integers(0, 3, rows),
        "ordinal": random.integers(0, 3, rows),
        "multi": (random.random((rows, 3)) < 0.4).astype(np.float32),
        "regression": random.normal(size=rows),
    }[kind]
    width = {"single": 3, "ordinal": 2, "multi": 3, "regression": 1}[kind]
    made = random.normal(size=(rows, width)).astype(np.float32) * 2
    return list(made), targets, () if kind == "regression" else LABELS


@pytest.mark.parametrize(
    "expression, names",
    [
        ("classify(kind='single')", {"accuracy", "loss"}),
        ("classify(kind='ordinal', order=['apple', 'pear', 'plum'])", {"accuracy", "loss"}),
        ("classify(kind='multi')", {"accuracy", "exact_match", "f1", "loss"}),
        ("classify(kind='regression')", {"loss", "mean_absolute_error"}),
    ],
)
def test_classification(expression, names):
    task = make_task(expression)
    made, targets, labels = outcomes(expression.split("'")[1])
    dataset: Any = SimpleNamespace(examples=SimpleNamespace(targets=targets))
    metrics = task.metrics(made, dataset, labels, intervals=False)
    found = task.by_row(made, dataset, labels)
    assert set(found) == names
    for name, values in found.items():
        above, below = values.sum(axis=0)
        assert values.shape == (50, 2) and above / below == pytest.approx(metrics[name], rel=1e-5), name


def test_choices():
    random = np.random.default_rng(0)
    logits = [random.normal(size=random.integers(2, 5)) for _ in range(30)]
    logs = [row - np.log(np.exp(row).sum()) for row in logits]
    dataset: Any = SimpleNamespace(
        examples=SimpleNamespace(targets=[int(random.integers(len(row))) for row in logs])
    )
    task = make_task("choice")
    metrics, found = task.metrics(logs, dataset, (), intervals=False), task.by_row(logs, dataset, ())
    for name in ("accuracy", "loss"):
        assert found[name][:, 0].mean() == pytest.approx(metrics[name])


def test_entities_and_plain_tags():
    labels = ("O", "B-city", "I-city", "B-name", "I-name")
    random = np.random.default_rng(1)
    wanted = [random.integers(0, 5, random.integers(3, 9)) for _ in range(40)]
    found = [np.where(random.random(len(row)) < 0.3, random.integers(0, 5, len(row)), row) for row in wanted]
    gold, guess = ([chunks([labels[i] for i in row]) for row in rows] for rows in (wanted, found))
    scores = entity_scores(gold, guess, ("city", "name"), intervals=False)
    made = by_sentence(wanted, found, labels)
    for name in ("f1", "precision", "recall"):
        above, below = made[name].sum(axis=0)
        assert above / below == pytest.approx(scores[name])
    assert set(by_sentence(wanted, found, ("DET", "NOUN", "VERB", "ADJ", "ADV"))) == {"accuracy"}
