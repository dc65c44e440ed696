"""Figures with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000


def classification(
    logits: np.ndarray, targets: np.ndarray, labels: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Accuracy, macro F1 and loss, 95% bootstrap intervals of the first two, and a table by class.

    logits (rows, classes), targets (rows,). Macro F1 is the mean over classes that occur in targets or
    predictions, as scikit-learn has it. The intervals are percentiles over 1,000 resamples of the rows.
    """
    from sklearn.metrics import precision_recall_fscore_support

    predictions = logits.argmax(axis=1)
    classes = len(labels)
    present = np.union1d(targets, predictions)
    precision, recall, f1, support = precision_recall_fscore_support(
        targets, predictions, labels=np.arange(classes), zero_division=0
    )
    counts = np.bincount(targets * classes + predictions, minlength=classes * classes)
    draws = np.random.default_rng(seed).multinomial(len(targets), counts / len(targets), size=RESAMPLES)
    draws = draws.reshape(RESAMPLES, classes, classes)
    accuracies = np.trace(draws, axis1=1, axis2=2) / len(targets)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return {
        "accuracy": float((predictions == targets).mean()),
        "accuracy_interval": _interval(accuracies),
        "macro_f1": float(f1[present].mean()),
        "macro_f1_interval": _interval(np.array([_macro_f1(draw) for draw in draws])),
        "loss": float(-log_probabilities[np.arange(len(targets)), targets].mean()),
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
    }


def _macro_f1(confusion: np.ndarray) -> float:
    hits = np.diag(confusion)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float((2 * hits[total > 0] / total[total > 0]).mean())


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]
