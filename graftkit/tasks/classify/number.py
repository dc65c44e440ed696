"""A number for each text: regression."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from graftkit.data.read import Table
from graftkit.data.source import Batch
from graftkit.data.split import hold_out
from graftkit.errors import UserError
from graftkit.tasks.base import Dataset, Examples, Learn, Term, one_term
from graftkit.tasks.classify.form import SCALE, Form, refuse_empty
from graftkit.tasks.explained import Aim
from graftkit.tasks.shared.by_row import means
from graftkit.tasks.shared.labels import LABEL
from graftkit.tasks.shared.metrics import interval, resamples

ROWS_OF_A_PART = 4  # at least; a stratum of rows with similar numbers, some of which are held out


class Number(Form):
    """One number. The loss is the squared error of standardized targets, so that the usual learning rates apply; all
    metrics are in the original units."""

    headline: ClassVar[tuple[str, ...]] = ("loss", "mean_absolute_error", "pearson", "spearman", "r2")
    directions: ClassVar[Mapping[str, str | None]] = {"loss": "min", "mean_absolute_error": "min"}
    aliases: ClassVar[tuple[str, ...]] = (*SCALE, *LABEL)

    def __init__(self, center: float | None, scale: float | None) -> None:
        self.center = 0.0 if center is None else center
        self.scale = 1.0 if scale is None else scale

    def wrong(
        self, table: Table, columns: dict[str, str], labels: Sequence[str]
    ) -> Callable[[int], str | None]:
        column = columns["label"]

        def problem(row: int) -> str | None:
            found = refuse_empty(table, column, row)
            if found is not None:
                return found
            value = table.columns[column][row]
            number = _number(value)
            if number is None:
                return f"{table.where(row)}: column {column!r} is {value!r}, not a number."
            if not math.isfinite(number):
                return f"{table.where(row)}: column {column!r} is {value!r}; a finite number is needed."
            return None

        return problem

    def numbers(self, table: Table, columns: dict[str, str], labels: Sequence[str]) -> np.ndarray:
        return np.array([float(value) for value in table.columns[columns["label"]]])

    def hold_out(self, examples: Examples, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Stratify by the size of the number, so that low, middle and high numbers are on both sides of the split."""
        targets = np.asarray(examples.targets)
        parts = max(1, min(round(len(targets) * share), len(targets) // ROWS_OF_A_PART))
        ranks = np.argsort(np.argsort(targets, kind="stable"))
        return hold_out((ranks * parts // max(1, len(targets))).tolist(), share, seed)

    def outputs(self, labels: Sequence[str]) -> int:
        return 1

    def output_names(self, labels: Sequence[str]) -> Sequence[str]:
        return ("value",)

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        """Return the squared error of logits (rows, 1), in squared standard deviations."""
        if label_smoothing:
            raise UserError(
                "train.label_smoothing spreads a target over classes, but a regression has no classes; leave it out."
            )

        def scores(logits: Tensor, batch: Batch) -> Term:
            assert batch.targets is not None
            wanted = ((batch.targets - self.center) / self.scale).float()
            return Term((logits[:, 0].float() - wanted) ** 2)

        return one_term(scores)

    def graded(self, outputs: Tensor) -> Tensor:
        return outputs * self.scale + self.center

    def aim(
        self, dataset: Dataset, outputs: Callable[[int], Tensor], labels: Sequence[str], label: str | None,
        word: str | None,
    ) -> Aim:  # fmt: skip
        if label is not None:
            raise UserError(f"label={label!r}: the answers of this run are numbers; leave the label out.")
        return Aim(0, (0,), {}, odds=False)

    def values(self, outcomes: Sequence[Any]) -> np.ndarray:
        """Return outputs in the original units, (rows,)."""
        return np.stack(outcomes)[:, 0].astype(np.float64) * self.scale + self.center

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        return of_numbers(self.values(outcomes), np.asarray(dataset.examples.targets), intervals)

    def by_row(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> dict[str, np.ndarray]:
        errors = self.values(outcomes) - np.asarray(dataset.examples.targets)
        return means(loss=errors**2, mean_absolute_error=np.abs(errors))

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        return [{"value": _short(value)} for value in self.values(outcomes)]

    def line(self, answer: dict[str, Any]) -> str:
        asked = [str(v) for k, v in answer.items() if k not in ("row", "value")]
        return "\t".join([f"{answer['value']:g}", *asked])

    def worst(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """Return the rows with the largest errors first."""
        examples, values = dataset.examples, self.values(outcomes)
        targets = np.asarray(examples.targets)
        errors = (values - targets) ** 2
        return [
            {
                "where": examples.where(i),
                **self.asked(examples, i),
                "expected": _short(targets[i]),
                "answer": _short(values[i]),
                "loss": _short(errors[i]),
            }
            for i in np.argsort(-errors, kind="stable")[:count].tolist()
            if errors[i] > 0
        ]

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        found, targets = super().statistics(dataset, labels), dataset.examples.targets
        if targets is not None:
            values = np.asarray(targets)
            found["values"] = {
                "mean": float(values.mean()), "deviation": float(values.std()), "lowest": float(values.min()),
                "highest": float(values.max()),
            }  # fmt: skip
        return found

    def plain(self, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "kind": "regression", "problem_type": "regression", "center": self.center, "scale": self.scale,
            "how": f"the number is output * {self.scale!r} + {self.center!r}",
        }  # fmt: skip


def units_of(examples: Examples) -> tuple[float, float]:
    """Return the mean and standard deviation of the training rows' numbers. Raises `UserError` if all are equal."""
    values = np.asarray(examples.targets)
    if not values.std() > 1e-12 * max(1.0, float(np.abs(values).max())):
        raise UserError(
            f"all training rows of {examples.table.source} have the same number ({values[0]:g}), so there is nothing "
            "to learn. Name another column with data.columns={label: ...}, or add rows."
        )
    return float(values.mean()), float(values.std())


def of_numbers(values: np.ndarray, targets: np.ndarray, intervals: bool = True) -> dict[str, Any]:
    """Compute the mean squared error (`loss`), mean absolute error, Pearson's and Spearman's correlation, and the share
    of explained variance, r2, of values and targets (rows,), with 95% intervals of the errors and of Pearson's correlation.

    A correlation is 0 if one side is constant. For constant targets r2 is 1 if all values are exact, else 0, as in
    scikit-learn.
    """
    errors = values - targets
    spread = float(((targets - targets.mean()) ** 2).sum())
    unexplained = float((errors**2).sum())
    right = 1.0 if unexplained == 0 else 0.0
    squares: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    correlations: list[np.ndarray] = []
    for drawn in resamples(len(targets)) if intervals else ():
        shares = drawn / len(targets)
        squares.append(shares @ errors**2)
        sizes.append(shares @ np.abs(errors))
        correlations.append(_correlation(values, targets, shares))
    whole = np.full((1, len(targets)), 1 / len(targets))
    return {
        "loss": float((errors**2).mean()),
        **interval("loss", squares),
        "mean_absolute_error": float(np.abs(errors).mean()),
        **interval("mean_absolute_error", sizes),
        "pearson": float(_correlation(values, targets, whole)[0]),
        **interval("pearson", correlations),
        "spearman": float(_correlation(_ranks(values), _ranks(targets), whole)[0]),
        "r2": 1 - unexplained / spread if spread else right,
        "rows": len(targets),
    }


def _correlation(values: np.ndarray, targets: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation under each row of weights (resamples, rows), each of which sums to 1."""
    first, second = values - values.mean(), targets - targets.mean()
    mean, other = shares @ first, shares @ second
    covariance = shares @ (first * second) - mean * other
    variances = (shares @ first**2 - mean**2) * (shares @ second**2 - other**2)
    tiny = 1e-14 * max(1e-300, float((first**2).mean() * (second**2).mean()))
    return np.where(variances > tiny, covariance / np.sqrt(np.maximum(variances, 1e-300)), 0.0)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _short(value: float) -> float:
    return float(f"{value:.6g}")
