"""Which rows go together: a pure function of lengths, seed and epoch, so that a run resumes where it was."""

from __future__ import annotations

import math

import numpy as np

WINDOW = 50  # batches that are drawn together, sorted by length, and cut


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers of each batch of an epoch; each row stands in exactly one.

    Rows are shuffled, then sorted by length within windows of 50 batches, so that a batch holds rows of like
    length and little padding; the order of the batches is shuffled again.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = order[start : start + WINDOW * batch_size]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def ordered_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches for prediction: longest first, so that a lack of memory shows at once."""
    order = np.argsort(-lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def steps_per_epoch(rows: int, batch_size: int, accumulate: int) -> int:
    """Optimizer steps in one epoch."""
    return math.ceil(math.ceil(rows / batch_size) / accumulate)


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of the tokens of these batches that are padding."""
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - int(lengths.sum()) / padded if padded else 0.0
