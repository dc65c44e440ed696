"""Labels that are likely wrong: what a linear head on frozen features, fitted without a row, says of the row's label.

A head that never saw a row disagrees with its label where the label is wrong, or where the features cannot tell. Northcutt,
Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels", compare such scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graftkit.errors import UserError
from graftkit.insight.probe import deal, standardized
from graftkit.insight.targets import fit_logistic

# C of logistic regression on standardized features; bench/label_errors.py compares it with others on flipped labels
STRENGTH = 0.03
STEPS = 100
TINY = 1e-12


@dataclass(frozen=True)
class Judged:
    """What a head says of the labels of rows. `scores` (rows,): how likely the label is wrong, in [0, 1]; above 0.5 where
    another answer is more likely. `suggested`: the more likely answer, in the form of the targets."""

    scores: np.ndarray
    suggested: np.ndarray


def out_of_fold(
    values: np.ndarray, targets: np.ndarray, classes: int, seed: int = 0, groups: np.ndarray | None = None
) -> np.ndarray:
    """Return the probabilities of each row, (rows, classes), by logistic regression on the rows of the other folds.

    `values`: features (rows, width); `targets` (rows,): indices of `classes` classes, or multi-hot (rows, classes), where
    each class has a regression of its own. Rows of each class are spread evenly over 5 folds; `seed` decides which. `groups`
    (rows,): rows with the same number, such as the words of a text, stay in one fold. Raises `UserError` if fewer than two
    classes have two rows.
    """
    _refuse_few(targets, classes)
    if groups is None:
        answers = (
            targets if targets.ndim == 1 else np.unique(targets, axis=0, return_inverse=True)[1].reshape(-1)
        )
        folds = deal(answers, seed)
    else:
        numbers = np.unique(groups, return_inverse=True)[1].reshape(-1)
        folds = deal(np.zeros(numbers.max() + 1), seed)[numbers]
    found = np.zeros((len(values), classes))
    for fold in range(int(folds.max()) + 1):
        inside, outside = folds == fold, folds != fold
        found[inside] = fitted(values[outside], targets[outside], values[inside], classes)
    return found


def fitted(values: np.ndarray, targets: np.ndarray, asked: np.ndarray, classes: int) -> np.ndarray:
    """Fit logistic regression to features (rows, width), and return its probabilities for other rows, (asked, classes)."""
    change = standardized(values)
    values, asked = change(values), change(asked)
    found = np.zeros((len(asked), classes))
    if targets.ndim == 1:
        known, numbers = np.unique(targets, return_inverse=True)
        found[:, known] = _logistic(values, numbers, asked)
        return found
    for label in range(classes):
        share = targets[:, label].mean()
        constant = share in (0, 1)
        found[:, label] = share if constant else _logistic(values, targets[:, label].astype(int), asked)[:, 1]
    return found


def _logistic(values: np.ndarray, numbers: np.ndarray, asked: np.ndarray) -> np.ndarray:
    if numbers.max() == 0:
        return np.ones((len(asked), 1))
    return fit_logistic(values, numbers, STRENGTH, STEPS).predict_proba(asked)


def _refuse_few(targets: np.ndarray, classes: int) -> None:
    counts = np.bincount(targets, minlength=classes) if targets.ndim == 1 else targets.sum(0)
    if (counts > 1).sum() < (2 if targets.ndim == 1 else 1):
        raise UserError(
            f"fewer than two of the {classes} labels have two rows, so no row can be judged by others; label more rows."
        )


def judge(probabilities: np.ndarray, targets: np.ndarray) -> Judged:
    """Judge labels by probabilities (rows, classes) that were computed without them.

    With one label per row, p its probability and q that of the most likely other label, the score is q / (p + q). With sets
    of labels, it is the probability of the most doubtful label of a row to be wrong, and those above 0.5 are changed in the
    suggestion.
    """
    rows = np.arange(len(targets))
    if targets.ndim > 1:
        wrong = np.abs(probabilities - targets)
        return Judged(wrong.max(1), np.where(wrong > 0.5, 1 - targets, targets))
    own = probabilities[rows, targets]
    others = probabilities.copy()
    others[rows, targets] = -1
    best = others.argmax(1)
    other = others[rows, best]
    return Judged(other / np.maximum(own + other, TINY), best)


def self_confidence(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the probability of each row's label, (rows,): low where it is likely wrong."""
    return probabilities[np.arange(len(targets)), targets]


def normalized_margin(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return (p - q + 1) / 2, (rows,), p the probability of the label and q that of the most likely other one."""
    own = self_confidence(probabilities, targets)
    others = probabilities.copy()
    others[np.arange(len(targets)), targets] = -1
    return (own - others.max(1) + 1) / 2
