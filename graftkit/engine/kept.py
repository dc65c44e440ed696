"""What a frozen prefix gave for each row of a dataset, kept in memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from graftkit.engine.parallel import add_up, gather


class Kept:
    """One value for each row, on the CPU: of one shape, or with `ragged` one vector for each of its tokens."""

    def __init__(self, lengths: np.ndarray, ragged: bool) -> None:
        self.lengths = lengths
        self.ragged = ragged
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.values: Tensor | None = None

    @property
    def _places(self) -> int:
        return int(self.offsets[-1]) if self.ragged else len(self.lengths)

    def exchange(self) -> None:
        """Give all processes what each of them has put: the values of the others are zero."""
        mine = None if self.values is None else (self.values.shape[1:], self.values.dtype)
        shape, kind = next(found for found in gather(mine) if found is not None)
        if self.values is None:
            self.values = torch.zeros((self._places, *shape), dtype=kind)
        add_up(self.values)

    def put(self, rows: np.ndarray, values: Tensor) -> None:
        """Keep `values` (rows, length, width), or (rows, ...) where all rows have one shape."""
        if self.values is None:
            of_one = values.shape[2:] if self.ragged else values.shape[1:]
            self.values = values.new_zeros((self._places, *of_one), device="cpu")
        if not self.ragged:
            self.values[torch.from_numpy(rows)] = values.cpu()
            return
        for i, row in enumerate(rows):
            start, end = self.offsets[row], self.offsets[row + 1]
            self.values[start:end] = values[i, : end - start].cpu()

    def get(self, rows: np.ndarray) -> Tensor:
        """What was kept of these rows, zero where there is padding."""
        assert self.values is not None
        if not self.ragged:
            return self.values[torch.from_numpy(rows)]
        states = self.values.new_zeros(len(rows), int(self.lengths[rows].max()), self.values.shape[1])
        for i, row in enumerate(rows):
            part = self.values[self.offsets[row] : self.offsets[row + 1]]
            states[i, : len(part)] = part
        return states
