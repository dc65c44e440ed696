"""The kinds of answers of `classify`: the shared base, one label per text, and one level of an ordered scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftkit.data.read import Table
from graftkit.data.source import Batch
from graftkit.errors import UserError, listing
from graftkit.tasks.base import Dataset, Learn, Task, Term, one_term
from graftkit.tasks.explained import log_odds
from graftkit.tasks.shared.labels import LABEL, LabelTask, cross_entropy, is_missing, label_text
from graftkit.tasks.shared.metrics import interval, resamples
from graftkit.tasks.shared.weights import class_weights

SCALE = (
    "score",
    "rating",
    "stars",
    "grade",
    "level",
    "similarity",
    "value",
)  # other names of a label with an order


class Form(Task):
    """One kind of answer: how it is read from a table, learned, evaluated and reported. A part of a task."""

    aliases: ClassVar[tuple[str, ...]] = LABEL

    def wrong(
        self, table: Table, columns: dict[str, str], labels: Sequence[str]
    ) -> Callable[[int], str | None]:
        """Return a function that says what is wrong with the answer of a row, and where; None if nothing is."""
        raise NotImplementedError

    def numbers(self, table: Table, columns: dict[str, str], labels: Sequence[str]) -> np.ndarray:
        """Return the targets of a table without bad rows: (rows,), or (rows, labels)."""
        raise NotImplementedError


class OneLabel(LabelTask, Form):
    """One of several labels."""

    calibrates: ClassVar[str | None] = "label"

    def __init__(self, class_weights: str | dict | None = None) -> None:
        self.class_weights = class_weights

    def class_weight(self, counts: np.ndarray, labels: Sequence[str]) -> Tensor | None:
        return class_weights(self.class_weights, counts, labels)

    def plain(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"kind": "single", "problem_type": "single_label_classification"}


class Ordinal(OneLabel):
    """One of several ordered labels, modelled by the conditional probability of each label being exceeded.

    Output k models the conditional probability P(y > k | y >= k) = f_k = sigmoid(z_k), so that
    P(y = k) = (1 - f_k) f_0 ... f_(k-1), which is always a distribution; the loss is -log P(y). The answer is the median,
    the number of labels with P(y > k) > 1/2. Shi, Cao and Raschka 2021, "Deep Neural Networks for Rank-Consistent
    Ordinal Regression Based On Conditional Probabilities", equations 4 and 5; known in statistics as the continuation
    ratio model. The K - 1 binary questions are from Frank and Hall 2001, rank consistency from Cao et al. 2020 (CORAL).
    """

    calibrates: ClassVar[str | None] = (
        None  # its logits are steps of a scale, of which a temperature moves the median
    )
    headline: ClassVar[tuple[str, ...]] = (
        "quadratic_weighted_kappa", "mean_absolute_error", "accuracy", "macro_f1",
    )  # fmt: skip
    directions: ClassVar[Mapping[str, str | None]] = {"mean_absolute_error": "min", "loss": "min"}
    aliases: ClassVar[tuple[str, ...]] = (*LABEL, *SCALE)

    def __init__(self, order: Sequence[str] | None, class_weights: str | dict | None = None) -> None:
        super().__init__(class_weights)
        self.order = None if order is None else tuple(label_text(label) for label in order)
        if order is not None:
            self.source_of_labels = "classify(order=...)"

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        names = super().label_names(table, columns, skip_bad)
        if self.order is not None:
            return self.order
        words = [name for name in names if not _is_number(name)]
        if words:
            raise UserError(
                f"column {columns['label']!r} of {table.source} has labels that are not numbers "
                f"({listing(map(repr, words), 4)}), so their order has to be given, lowest first: "
                "classify(kind='ordinal', order=['bad', 'fair', 'good'])."
            )
        return names

    def outputs(self, labels: Sequence[str]) -> int:
        return len(labels) - 1

    def output_names(self, labels: Sequence[str]) -> Sequence[str]:
        return [f"above {label}" for label in labels[:-1]]

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        """Return the loss -log P(y) of logits (rows, classes - 1)."""
        targets = dataset.examples.targets
        assert isinstance(targets, np.ndarray)
        weights = self.class_weight(np.bincount(targets, minlength=len(labels)), labels)

        def scores(logits: Tensor, batch: Batch) -> Term:
            assert batch.targets is not None
            log_probs = chances_of_steps(logits.float())
            losses = cross_entropy(log_probs, batch.targets, label_smoothing, weights)
            return Term(losses, median(log_probs.detach()) == batch.targets)

        return one_term(scores)

    def log_probabilities(self, outcomes: Sequence[Any]) -> np.ndarray:
        return chances_of_steps(torch.from_numpy(np.stack(outcomes))).numpy()

    def graded(self, outputs: Tensor) -> Tensor:
        return log_odds(chances_of_steps(outputs))

    def chosen(self, grades: Tensor) -> int:
        return int(median(torch.nn.functional.logsigmoid(grades)[None])[0])

    def choices(self, log_probs: np.ndarray) -> np.ndarray:
        return median(torch.from_numpy(log_probs)).numpy()

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        targets, chosen = dataset.examples.targets, self.choices(self.log_probabilities(outcomes))
        assert isinstance(targets, np.ndarray)
        found = super().metrics(outcomes, dataset, labels, intervals)
        return found | of_steps(chosen, targets, len(labels), intervals)

    def plain(self, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "kind": "ordinal", "labels": list(labels),
            "how": "the answer is the label at the number of k with sigmoid(z_0) * ... * sigmoid(z_k) > 0.5",
        }  # fmt: skip


def chances_of_steps(logits: Tensor) -> Tensor:
    """Return log P(y), (rows, classes), given logits (rows, classes - 1) of exceeding each class but the last."""
    reached = torch.nn.functional.logsigmoid(logits).cumsum(dim=1)
    start = torch.zeros_like(logits[:, :1])
    stopped = torch.nn.functional.logsigmoid(-logits)
    return torch.cat([start, reached], dim=1) + torch.cat([stopped, start], dim=1)


def median(log_probs: Tensor) -> Tensor:
    """Return the median class of each distribution, (rows,), given log-probabilities (rows, classes) in order."""
    above = 1 - log_probs.exp().cumsum(dim=1)[:, :-1]
    return (above > 0.5).sum(dim=1)


def of_steps(
    predictions: np.ndarray, targets: np.ndarray, classes: int, intervals: bool = True
) -> dict[str, Any]:
    """Compute how far predictions (rows,) are from targets on an ordered scale: the mean distance in classes, and Cohen's
    kappa with quadratic weights (Cohen 1968), each with its 95% interval.

    Kappa is 0 if it is undefined because all predictions and targets are the same class.
    """
    distances = np.abs(predictions - targets)
    cells = targets * classes + predictions
    far: list[float] = []
    kappas: list[float] = []
    for drawn in resamples(len(targets)) if intervals else ():
        far += [*(drawn @ distances / len(targets))]
        kappas += [
            _kappa(np.bincount(cells, counts, classes**2).reshape(classes, classes)) for counts in drawn
        ]
    return {
        "mean_absolute_error": float(distances.mean()),
        **interval("mean_absolute_error", far),
        "quadratic_weighted_kappa": _kappa(
            np.bincount(cells, minlength=classes**2).reshape(classes, classes)
        ),
        **interval("quadratic_weighted_kappa", kappas),
    }


def _kappa(table: np.ndarray) -> float:
    steps = np.arange(len(table))
    weights = (steps[:, None] - steps) ** 2
    chance = float((weights * np.outer(table.sum(axis=1), table.sum(axis=0))).sum() / table.sum())
    return 1 - float((weights * table).sum()) / chance if chance else 0.0


def _is_number(name: str) -> bool:
    try:
        return bool(np.isfinite(float(name)))
    except ValueError:
        return False


def refuse_empty(table: Table, column: str, row: int) -> str | None:
    """Return a message if the cell of an answer is empty, else None."""
    if is_missing(table.columns[column][row]):
        return f"{table.where(row)}: column {column!r} is empty."
    return None
