"""Shared code of tasks that predict one of several labels: label names, loss, metrics, answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.data.read import Table
from graftkit.data.source import Batch
from graftkit.errors import UserError, listing, nearest
from graftkit.tasks.base import Dataset, Learn, Task, Term, one_term
from graftkit.tasks.explained import log_odds
from graftkit.tasks.shared.by_row import means
from graftkit.tasks.shared.metrics import calibration, log_softmax, of_choices

UNKNOWN = "unknown"  # shown for a row that is like none of the labels
TOLD = ("row", "label", "probability", "labels", "known")  # of an answer; the rest is what was asked
LABEL = ("category", "intent", "class", "target", "labels", "topic", "sentiment", "y")


class LabelTask(Task):
    """Base of tasks that predict one label for each example. `examples.targets` are label indices, (rows,) int64."""

    source_of_labels: str = "the training data"
    explains = True

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        values = [value for value in table.columns[columns["label"]] if not is_missing(value)]
        if skip_bad:
            values = [value for value in values if not is_several(value)]
        else:
            _refuse_several(table, columns["label"])
        names = sorted({label_text(value) for value in values}, key=natural)
        if not names:
            raise UserError(f"column {columns['label']!r} of {table.source} has no labels.")
        if len(names) == 1:
            raise UserError(
                f"column {columns['label']!r} of {table.source} has only one class ({names[0]!r}), so there is "
                "nothing to learn. Choose another column with data.columns={label: ...}, or add rows of other classes."
            )
        if len(names) > max(20, len(values) // 2):
            raise UserError(
                f"column {columns['label']!r} of {table.source} has {len(names)} different values in {len(values)} "
                "rows, so it does not look like a label. Choose the label column with data.columns={label: ...}."
            )
        return tuple(names)

    def wrong(
        self, table: Table, columns: dict[str, str], labels: Sequence[str]
    ) -> Callable[[int], str | None]:
        """Return a function that maps a row number to what is wrong with its label, and where, or to None."""
        index, column = LabelIndex(labels), columns["label"]

        def problem(row: int) -> str | None:
            value = table.columns[column][row]
            if is_missing(value):
                return f"{table.where(row)}: column {column!r} is empty."
            if is_several(value):
                return _several(table, column, row)
            found = label_problem(value, index, self.source_of_labels)
            return None if found is None else f"{table.where(row)}: {found}"

        return problem

    def numbers(self, table: Table, columns: dict[str, str], labels: Sequence[str]) -> np.ndarray:
        """Return the index of each row's label, (rows,), for a table without bad rows."""
        index = LabelIndex(labels)
        return np.array(
            [index.find(label_text(value)) for value in table.columns[columns["label"]]], np.int64
        )

    def log_probabilities(self, outcomes: Sequence[Any]) -> np.ndarray:
        """Return log-probabilities (rows, classes)."""
        return log_softmax(np.stack(outcomes))

    def choices(self, log_probs: np.ndarray) -> np.ndarray:
        """Return the predicted label, (rows,), given log-probabilities (rows, classes)."""
        return log_probs.argmax(axis=1)

    def graded(self, outputs: Tensor) -> Tensor:
        return log_odds(outputs.log_softmax(-1))

    def class_weight(self, counts: np.ndarray, labels: Sequence[str]) -> Tensor | None:
        """Return the weight of each class in the loss, or None. `counts`: training rows of each class, (labels,)."""
        return None

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        loss = self.loss(dataset, labels, label_smoothing)

        def of_batch(logits: Tensor, batch: Batch) -> Term:
            assert batch.targets is not None
            return loss(logits, batch.targets)

        return one_term(of_batch)

    def loss(
        self, dataset: Dataset, labels: Sequence[str], label_smoothing: float
    ) -> Callable[[Tensor, Tensor], Term]:
        """Return the cross-entropy of logits (rows, classes) and targets (rows,)."""
        targets = dataset.examples.targets
        assert isinstance(targets, np.ndarray)
        weights = self.class_weight(np.bincount(targets, minlength=len(labels)), labels)

        def of_targets(logits: Tensor, targets: Tensor) -> Term:
            losses = cross_entropy(logits, targets, label_smoothing, weights)
            return Term(losses, logits.detach().argmax(-1) == targets)

        return of_targets

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        targets = dataset.examples.targets
        assert isinstance(targets, np.ndarray)
        log_probs, rows = self.log_probabilities(outcomes), np.arange(len(targets))
        chosen = self.choices(log_probs)
        found = of_choices(chosen, targets, -log_probs[rows, targets], labels, intervals=intervals)
        if intervals:
            found["calibration"] = calibration(np.exp(log_probs[rows, chosen]), chosen == targets)
        return found

    def by_row(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> dict[str, np.ndarray]:
        targets, log_probs = dataset.examples.targets, self.log_probabilities(outcomes)
        assert isinstance(targets, np.ndarray)
        right = self.choices(log_probs) == targets
        return means(accuracy=right, loss=-log_probs[np.arange(len(targets)), targets])

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the most likely label of each row and its probability."""
        log_probs = self.log_probabilities(outcomes)
        return [
            {"label": labels[b], "probability": round(float(np.exp(p[b])), 4)}
            for b, p in zip(self.choices(log_probs), log_probs)
        ]

    def line(self, answer: dict[str, Any]) -> str:
        asked = [str(v) for k, v in answer.items() if k not in TOLD]
        label = answer["label"] if answer.get("known", True) else f"{UNKNOWN} ({answer['label']})"
        labels = [" | ".join(answer["labels"])] if "labels" in answer else []
        return "\t".join([label, f"{answer['probability']:.3f}", *labels, *asked])

    def worst(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """Return wrong answers, largest loss first."""
        targets, log_probs = dataset.examples.targets, self.log_probabilities(outcomes)
        chosen = self.choices(log_probs)
        assert isinstance(targets, np.ndarray)
        losses = -log_probs[np.arange(len(targets)), targets]
        wrong = [int(i) for i in np.argsort(-losses) if chosen[i] != targets[i]]
        return [
            {
                "where": dataset.examples.where(i),
                **self.asked(dataset.examples, i),
                "expected": labels[targets[i]],
                "answer": labels[chosen[i]],
                "loss": round(float(losses[i]), 4),
            }
            for i in wrong[:count]
        ]

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        found, targets = super().statistics(dataset, labels), dataset.examples.targets
        if targets is not None:
            counts = Counter(np.asarray(targets).tolist())
            found["labels"] = {label: counts.get(i, 0) for i, label in enumerate(labels)}
        return found


def cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Return the loss of each row, (rows,), in fp32, multiplied by the class weights `weights` (classes,)."""
    losses = torch.nn.functional.cross_entropy(
        logits.float(), targets, reduction="none", label_smoothing=label_smoothing
    )
    return losses if weights is None else losses * weights.to(losses.device)[targets]


def label_problem(value: Any, labels: LabelIndex, source: str = "the training data") -> str | None:
    """Return a message for a label that is not among the known ones, which come from `source`; else None."""
    if labels.find(label_text(value)) is not None:
        return None
    return (
        f"label {label_text(value)!r} is not among the {len(labels.labels)} labels of {source} "
        f"({listing(labels.labels, 8)}).{nearest(label_text(value), labels.labels)}"
    )


def is_several(value: Any) -> bool:
    """Return whether a cell holds a list, a vector or a mapping, so it cannot be a label."""
    return isinstance(value, list | tuple | set | dict) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _several(table: Table, column: str, row: int) -> str:
    value = table.columns[column][row]
    kind = "mapping" if isinstance(value, dict) else "list"
    return (
        f"{table.where(row)}: column {column!r} is a {kind} ({repr(value)[:60]}), but one label "
        "is expected; for several labels per row, or vectors of 0 and 1, use classify(kind='multi')."
    )


def _refuse_several(table: Table, column: str) -> None:
    row = next((row for row, value in enumerate(table.columns[column]) if is_several(value)), None)
    if row is not None:
        raise UserError(_several(table, column, row))


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or not str(value).strip()


def label_text(value: Any) -> str:
    """Return a label as text: 3, 3.0 and '3' are the same label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


class LabelIndex:
    """Look up the index of a label. A label that other file formats write differently ('1.0' in CSV and 1 in Parquet,
    'true' and True) is found if the match is unambiguous."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = labels
        self._places = {label: i for i, label in enumerate(labels)}
        forms = Counter(map(_normal, labels))
        self._normal = {_normal(label): i for i, label in enumerate(labels) if forms[_normal(label)] == 1}

    def find(self, name: str) -> int | None:
        place = self._places.get(name)
        return self._normal.get(_normal(name)) if place is None else place


def _normal(name: str) -> str:
    if re.fullmatch(r"-?\d+\.0+", name):
        return name.partition(".")[0]
    return name.lower() if name.lower() in ("true", "false") else name


def natural(name: str) -> tuple[int, float, str]:
    """Sort key: numbers in ascending order, then texts. 'nan' and 'inf' count as texts, because nan cannot be ordered."""
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (0, number, name) if math.isfinite(number) else (1, 0.0, name)
