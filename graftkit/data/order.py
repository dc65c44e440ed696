"""Which rows go together: a pure function of lengths, seed and epoch, so that a run resumes where it was."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Protocol

import numpy as np

WINDOW = 50  # batches that are drawn together, sorted by length, and cut


class Order(Protocol):
    """The batches of one epoch, by index."""

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def batches(self, start: int, end: int) -> list[np.ndarray]:
        """Return the row numbers of batches `start` to `end`, exclusive; fewer if the epoch ends before."""
        ...


class ByLength:
    """Rows of like length share a batch (see `epoch_batches`). Holds one number for each row."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    @cached_property
    def _batches(self) -> list[np.ndarray]:
        return epoch_batches(self.lengths, self.batch_size, self.seed, self.epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def batches(self, start: int, end: int) -> list[np.ndarray]:
        return self._batches[start:end]


class Permuted:
    """All rows have one length. Nothing is held: the row at each place is computed from its number.

    Places 0 to `rows` are permuted by a Feistel network of four rounds over the next power of four; what falls behind
    `rows` is permuted again until it does not (cycle walking; Black and Rogaway 2002, "Ciphers with Arbitrary Finite
    Domains"). Fewer than four tries on average.
    """

    ROUNDS = 4

    def __init__(self, rows: int, batch_size: int, seed: int, epoch: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.bits = max(1, math.ceil(math.log2(max(2, rows)) / 2))  # of each half
        self.keys = np.random.SFC64([seed, epoch]).random_raw(self.ROUNDS).astype(np.uint64)

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def batches(self, start: int, end: int) -> list[np.ndarray]:
        first, last = start * self.batch_size, min(end * self.batch_size, self.rows)
        rows = self.at(np.arange(first, max(first, last), dtype=np.uint64))
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def at(self, places: np.ndarray) -> np.ndarray:
        """The rows (places,) at these places of the epoch."""
        rows = self._encrypted(places)
        while (outside := rows >= self.rows).any():
            rows[outside] = self._encrypted(rows[outside])
        return rows.astype(np.int64)

    def _encrypted(self, places: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self.bits), np.uint64((1 << self.bits) - 1)
        left, right = places >> half, places & mask
        for key in self.keys:
            left, right = right, left ^ (mixed(right + key) & mask)
        return (left << half) | right


def mixed(x: np.ndarray) -> np.ndarray:
    """64 bits, each of which depends on all of those of x (the finalizer of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
    """Return batches for prediction, longest first, so that running out of memory shows at once."""
    order = np.argsort(-lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def steps_per_epoch(rows: int, batch_size: int, accumulate: int) -> int:
    """Return the number of optimizer steps in one epoch."""
    return math.ceil(math.ceil(rows / batch_size) / accumulate)


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Return the share of padding among the tokens of these batches."""
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - int(lengths.sum()) / padded if padded else 0.0
