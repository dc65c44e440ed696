"""A linear probe: how much of the answers a linear model reads from features, in cross-validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.errors import UserError
from graftkit.insight.targets import Classes, Predict, Targets
from graftkit.tasks.shared.metrics import resamples

FOLDS = 5  # each row is predicted by a model that was fitted without its fold


@dataclass(frozen=True)
class Figure:
    """A metric of scores, with its 95% bootstrap interval."""

    metric: str
    value: float
    interval: tuple[float, float]


def folds_of(targets: Targets, seed: int = 0) -> np.ndarray:
    """Return the number of the fold of each row, (rows,). Rows with like answers are dealt to the folds in turn.

    Raises `UserError` if fewer than two classes have two rows, so that one cannot be tried on what another row has taught.
    """
    if isinstance(targets, Classes) and (np.bincount(targets.numbers) > 1).sum() < 2:
        raise UserError(
            f"fewer than two of the {targets.count} classes have two rows, so nothing can be fitted to some rows and tried on "
            "others; label more rows."
        )
    return deal(targets.order, seed)


def deal(answers: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the number of the fold of each row, (rows,): rows with like answers (rows,) are dealt to the folds in turn."""
    shuffled = np.random.default_rng(seed).permutation(len(answers))
    by_answer = shuffled[np.argsort(answers[shuffled], kind="stable")]
    folds = np.empty(len(answers), np.int64)
    folds[by_answer] = np.arange(len(answers)) % min(FOLDS, len(answers))
    return folds


def out_of_fold(
    features: Any, targets: Targets, folds: np.ndarray, prepare: Callable[[Any], Callable[[Any], Any]] | None = None
) -> np.ndarray:  # fmt: skip
    """Return the scores of each row, (rows, columns), by a model that was fitted to the rows of the other folds.

    `features`: (rows, width), or anything that is indexed by rows. `prepare` fits a transformation to the rows of the other
    folds; by default they are standardized.
    """
    scores: np.ndarray | None = None
    for fold in range(int(folds.max()) + 1):
        inside, outside = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        change = (prepare or standardized)(features[outside])
        predicted = targets.take(outside).fit(change(features[outside]))(change(features[inside]))
        if scores is None:
            scores = np.empty((len(folds), predicted.shape[1]), np.float32)
        scores[inside] = predicted
    assert scores is not None
    return scores


def standardized(features: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that subtracts the mean of these features, and divides by their standard deviation."""
    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    std[std < 1e-6 * max(1e-30, float(np.abs(features).max()))] = 1.0  # constant
    return lambda given: ((given - mean) / std).astype(np.float32)


def fit_probe(features: np.ndarray, targets: Targets) -> Predict:
    """Fit a probe to all rows; return a function from features to scores."""
    change = standardized(features)
    predict = targets.fit(change(features))
    return lambda given: predict(change(given))


def figure(scores: np.ndarray, targets: Targets) -> Figure:
    """Return the metric of scores (rows, columns), and its 95% interval over 1,000 resamples of the rows."""
    whole = np.ones((1, len(scores)))
    drawn = np.concatenate([targets.measure(scores, part) for part in resamples(len(scores))])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Figure(targets.metric, float(targets.measure(scores, whole)[0]), (float(low), float(high)))


def difference(first: np.ndarray, second: np.ndarray, targets: Targets) -> tuple[float, float]:
    """Return the 95% interval of the metric of the first scores minus that of the second, on the same resamples."""
    parts = resamples(len(first))
    drawn = np.concatenate([targets.measure(first, part) - targets.measure(second, part) for part in parts])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
