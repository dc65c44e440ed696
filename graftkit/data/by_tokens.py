"""Batches of as many rows as fit into a number of tokens, instead of a number of rows."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from graftkit.data.order import Order, ordered_batches, steps_per_epoch
from graftkit.data.source import Source
from graftkit.errors import UserError

FINE = (
    16  # lengths within a sixteenth of one another count as equal, so that such rows meet in any combination
)


class ByTokens:
    """Each batch has at most `tokens` tokens with its padding.

    Lengths are rounded up to steps of about a sixteenth. Rows are sorted by these, those of equal rounded length in an order
    drawn for each epoch, and the sequence is cut from its long end. The sequence of rounded lengths is that of every epoch,
    and so are the cuts and the number of batches; the rows of a batch and the order of the batches are drawn anew.
    """

    def __init__(self, lengths: np.ndarray, tokens: int, seed: int, epoch: int) -> None:
        self.lengths, self.tokens, self.seed, self.epoch = lengths, tokens, seed, epoch

    @cached_property
    def _batches(self) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        rounded = rounded_up(self.lengths)
        order = order[np.argsort(-rounded[order], kind="stable")]
        batches = np.split(order, cuts(rounded, self.tokens)[1:])
        return [batches[i] for i in random.permutation(len(batches))]

    def __len__(self) -> int:
        return len(self._batches)

    def batches(self, start: int, end: int) -> list[np.ndarray]:
        return self._batches[start:end]


def rounded_up(lengths: np.ndarray) -> np.ndarray:
    """Return the lengths (rows,), rounded up to a multiple of a power of two near a sixteenth, but at most to the longest."""
    sizes = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    step = 2 ** np.maximum(np.floor(np.log2(sizes)).astype(np.int64) - int(math.log2(FINE)), 0)
    return np.minimum(-(-sizes // step) * step, sizes.max(initial=1))


def cuts(rounded: np.ndarray, tokens: int) -> list[int]:
    """Return the place at which each batch begins when rows are sorted by rounded length, longest first."""
    longest_first = np.sort(rounded)[::-1]
    found, place = [], 0
    while place < len(longest_first):
        found.append(place)
        place += max(1, tokens // int(longest_first[place]))
    return found


def order_of(source: Source, settings: Any, epoch: int) -> Order:
    """Return the batches of an epoch. `settings` has `batch_size`, `batch_tokens` and `seed`."""
    if settings.batch_tokens is None:
        return source.order(settings.batch_size, settings.seed, epoch)
    if source.uniform or isinstance(source.lengths, int):
        return source.order(settings.batch_tokens // longest_of(source), settings.seed, epoch)
    return ByTokens(source.lengths, settings.batch_tokens, settings.seed, epoch)


def longest_of(source: Source) -> int:
    """Return the largest length of a row."""
    if isinstance(source.lengths, int):
        return source.lengths
    if source.uniform:  # not all of them are looked at, as there may be any number
        return int(source.lengths[0])
    return int(source.lengths.max())


def steps_of(source: Source, settings: Any, width: int) -> int:
    """Return the number of steps of an epoch in which `width` batches make a step."""
    if settings.batch_tokens is None:
        return steps_per_epoch(len(source), settings.batch_size, width)
    if source.uniform or isinstance(source.lengths, int):
        return steps_per_epoch(len(source), settings.batch_tokens // longest_of(source), width)
    return math.ceil(len(cuts(rounded_up(source.lengths), settings.batch_tokens)) / width)


def check_tokens(source: Source, tokens: int | None) -> None:
    """Raise `UserError` if rows cannot be counted in tokens, or one is longer than a batch."""
    if tokens is None:
        return
    if source.unit != "tokens":
        raise UserError(
            f"train.batch_tokens counts tokens, but the rows of this task are {source.unit}; use train.batch_size."
        )
    longest = longest_of(source) if len(source) else 0
    if longest > tokens:
        where = "" if source.uniform else f" ({source.where(int(np.argmax(source.lengths)))})"
        raise UserError(
            f"train.batch_tokens={tokens} is less than the {longest} tokens of the longest row{where}; raise it to at least "
            f"{longest}, or lower data.max_length."
        )


def prediction_batches(lengths: np.ndarray, batch_size: int, tokens: int | None = None) -> list[np.ndarray]:
    """Return batches for prediction, longest first, of so many rows or, if that is given, tokens with padding."""
    if tokens is None:
        return ordered_batches(lengths, batch_size)
    order = np.argsort(-lengths, kind="stable")
    return np.split(order, cuts(np.maximum(lengths, 1), tokens)[1:]) if len(order) else []


def prediction_sizes(train: Any) -> tuple[int, int | None]:
    """Return the rows, and with train.batch_tokens the tokens, of a batch without gradients: twice those of training."""
    return 2 * train.batch_size, None if train.batch_tokens is None else 2 * train.batch_tokens
