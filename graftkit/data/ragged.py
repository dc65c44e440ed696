"""Rows of different lengths in one array, joined and padded by indexing instead of a loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np


def places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the indices start, start + 1, ... of `length` elements for each row, one row after another."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


class Ragged(Sequence[np.ndarray]):
    """Vectors of different lengths, stored one after another; `ragged[row]` is a view of one.

    `values` (sum of lengths,), `lengths` (rows,), `offsets` (rows + 1,): row i is values[offsets[i]:offsets[i + 1]].
    """

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self.lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.values = np.concatenate(rows) if len(rows) else np.zeros(0, dtype=np.int64)

    def like(self, values: np.ndarray) -> Ragged:
        """Return rows of the same lengths with other values (sum of lengths,)."""
        other = Ragged.__new__(Ragged)
        other.lengths, other.offsets, other.values = self.lengths, self.offsets, values
        return other

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, row: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def joined(self, rows: np.ndarray) -> np.ndarray:
        """Return the values of these rows, one row after another."""
        return self.values[places(self.offsets[rows], self.lengths[rows])]

    def padded(self, rows: np.ndarray, fill: int, *, left: bool = False) -> np.ndarray:
        """Return these rows as int64 (rows, longest row), padded with `fill` on the right, or on the left if `left`."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        result = np.full((len(rows), width), fill, dtype=np.int64)
        starts = np.arange(len(rows)) * width + (width - lengths if left else 0)
        result.reshape(-1)[places(starts, lengths)] = self.joined(rows)
        return result


def pad(rows: Sequence[np.ndarray], fill: int, *, left: bool = False) -> np.ndarray:
    """Return rows as int64 (rows, longest row), padded with `fill` on the right, or on the left if `left`."""
    return Ragged(rows).padded(np.arange(len(rows)), fill, left=left)


def mask(lengths: np.ndarray, *, left: bool = False) -> np.ndarray:
    """Return an int64 mask (rows, longest row): 1 for values, 0 for padding."""
    columns = np.arange(int(lengths.max()))
    inside = columns >= columns.size - lengths[:, None] if left else columns < lengths[:, None]
    return inside.astype(np.int64)
