"""Classification metrics with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
CELLS = 1000  # of a confusion matrix that are reported
BINS = 10  # of probabilities, for calibration


def classification(
    logits: np.ndarray, targets: np.ndarray, labels: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Return the metrics of `of_choices` for the argmax of logits (rows, classes), with cross-entropy as the loss."""
    losses = -log_softmax(logits)[np.arange(len(targets)), targets]
    return of_choices(logits.argmax(axis=1), targets, losses, labels, seed)


def of_choices(
    predictions: np.ndarray,
    targets: np.ndarray,
    losses: np.ndarray,
    labels: Sequence[str],
    seed: int = 0,
    intervals: bool = True,
) -> dict[str, Any]:
    """Return accuracy, macro F1 and loss, 95% bootstrap intervals of the first two, and a table by class; with
    `intervals` also the `confusion` of classes.

    `predictions`, `targets` and `losses` (rows,). Macro F1 is the mean over the classes that occur in the targets or
    predictions, as in scikit-learn. The intervals are percentiles over 1,000 resamples of the rows.
    """
    from sklearn.metrics import precision_recall_fscore_support

    classes = len(labels)
    present = np.union1d(targets, predictions)
    precision, recall, f1, support = precision_recall_fscore_support(
        targets, predictions, labels=np.arange(classes), zero_division=0
    )
    accuracies, macro_f1s = (
        _bootstrap(targets, predictions, classes, seed) if intervals else (np.empty(0), np.empty(0))
    )
    return {
        "accuracy": float((predictions == targets).mean()),
        **interval("accuracy", accuracies),
        "macro_f1": float(f1[present].mean()),
        **interval("macro_f1", macro_f1s),
        "loss": float(losses.mean()),
        "rows": len(targets),
        "per_class": {
            label: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "rows": int(support[i]),
            }
            for i, label in enumerate(labels)
        },
        **({"confusion": confusion(predictions, targets, classes)} if intervals else {}),
    }


def confusion(predictions: np.ndarray, targets: np.ndarray, classes: int) -> list[list[int]]:
    """Return the non-zero cells off the diagonal of the confusion matrix as [target, prediction, rows], indices of labels,
    the most frequent first; at most 1,000, which are all of them for up to 32 classes.

    `predictions` and `targets` (rows,).
    """
    wrong = predictions != targets
    cells, counts = np.unique(
        targets[wrong].astype(np.int64) * classes + predictions[wrong], return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:CELLS]
    return [
        [int(cell) // classes, int(cell) % classes, int(n)] for cell, n in zip(cells[order], counts[order])
    ]


def calibration(confidences: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Return how well probabilities agree with the fraction of correct answers, over ten bins of equal width.

    `confidences` (answers,): the probability of each answer; `correct` (answers,): whether it is right. Each non-empty bin
    is [lower end, upper end, answers, mean probability, fraction correct]; `error` is the expected calibration error, the
    mean distance between the last two, weighted by answers (Guo et al. 2017, "On Calibration of Modern Neural Networks",
    equation 3).
    """
    known = np.isfinite(confidences)
    confidences, correct = confidences[known].astype(np.float64), correct[known].astype(np.float64)
    places = np.clip((confidences * BINS).astype(int), 0, BINS - 1)
    bins = []
    for i in np.unique(places).tolist():
        inside = places == i
        mean, right = float(confidences[inside].mean()), float(correct[inside].mean())
        bins.append([i / BINS, (i + 1) / BINS, int(inside.sum()), mean, right])
    far = sum(n * abs(mean - right) for _, _, n, mean, right in bins)
    return {"error": far / len(correct) if len(correct) else 0.0, "bins": bins}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities over the last dimension."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _bootstrap(
    targets: np.ndarray, predictions: np.ndarray, classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracy and macro F1 for each resample of the rows, both (resamples,).

    Drawing rows with replacement is drawing counts for the non-empty cells of the confusion matrix, of which there are
    at most as many as rows; the full (classes, classes) matrix is never built.
    """
    cells, counts = np.unique(targets.astype(np.int64) * classes + predictions, return_counts=True)
    names, index = np.unique(np.divmod(cells, classes), return_inverse=True)  # the classes that occur
    true, predicted = index.reshape(2, -1)
    right = true == predicted
    random, shares = np.random.default_rng(seed), counts / len(targets)
    accuracies, macro_f1s = np.empty(RESAMPLES), np.empty(RESAMPLES)
    size = max(1, 1_000_000 // (len(cells) + len(names)))
    for start in range(0, RESAMPLES, size):
        block = slice(start, min(start + size, RESAMPLES))
        drawn = random.multinomial(len(targets), shares, size=block.stop - start)
        total = _by_class(drawn, true, len(names)) + _by_class(drawn, predicted, len(names))
        correct = _by_class(drawn[:, right], true[right], len(names))
        accuracies[block] = correct.sum(axis=1) / len(targets)
        f1 = np.divide(2 * correct, total, out=np.zeros(total.shape), where=total > 0)
        macro_f1s[block] = f1.sum(axis=1) / (total > 0).sum(axis=1)
    return accuracies, macro_f1s


def _by_class(drawn: np.ndarray, of: np.ndarray, classes: int) -> np.ndarray:
    """Sum counts (resamples, cells) over the cells of each class, `of` (cells,): (resamples, classes)."""
    order = np.argsort(of, kind="stable")
    present, starts = np.unique(of[order], return_index=True)
    found = np.zeros((len(drawn), classes), drawn.dtype)
    if len(present):
        found[:, present] = np.add.reduceat(drawn[:, order], starts, axis=1)
    return found


def resamples(rows: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield how often each row is drawn in 1,000 resamples of the rows, in blocks (resamples, rows)."""
    random, shares = np.random.default_rng(seed), np.full(rows, 1 / rows)
    size = max(1, min(RESAMPLES, 4_000_000 // rows))
    for start in range(0, RESAMPLES, size):
        yield random.multinomial(rows, shares, size=min(size, RESAMPLES - start)).astype(np.float64)


def mean_interval(
    name: str, values: np.ndarray, intervals: bool = True, seed: int = 0
) -> dict[str, list[float]]:
    """Return the 95% bootstrap interval of the mean of `values` (rows,). Equal values are drawn together, as counts."""
    if not intervals:
        return {}
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=RESAMPLES)
    return interval(name, drawn @ distinct / len(values))


def interval(name: str, values: np.ndarray | Sequence[Any]) -> dict[str, list[float]]:
    """Return the 2.5th and 97.5th percentiles of resampled values as `NAME_interval`; empty if there are no values."""
    if not len(values):
        return {}
    drawn = (
        values if isinstance(values, np.ndarray) else np.concatenate([np.atleast_1d(part) for part in values])
    )
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {f"{name}_interval": [float(low), float(high)]}
