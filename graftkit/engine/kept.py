"""Cached activations of a frozen prefix for each row of a dataset: in memory, or in memory-mapped files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graftkit.data.ragged import places
from graftkit.engine.blocks import Block
from graftkit.engine.parallel import add_up, gather


class Kept:
    """One value per row, on the CPU: all of one shape, or with `ragged` one vector per token."""

    def __init__(self, lengths: np.ndarray, ragged: bool) -> None:
        self.lengths = lengths
        self.ragged = ragged
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.values: Tensor | None = None

    @property
    def _places(self) -> int:
        return int(self.offsets[-1]) if self.ragged else len(self.lengths)

    def exchange(self) -> None:
        """Share the values of each process with all: values that other processes computed are zero before."""
        mine = None if self.values is None else (self.values.shape[1:], self.values.dtype)
        shape, kind = next(found for found in gather(mine) if found is not None)
        if self.values is None:
            self.values = torch.zeros((self._places, *shape), dtype=kind)
        add_up(self.values)

    def put(self, rows: np.ndarray, values: Tensor) -> None:
        """Store `values` (rows, length, width), or (rows, ...) if all rows have one shape."""
        if self.values is None:
            of_one = values.shape[2:] if self.ragged else values.shape[1:]
            self.values = values.new_zeros((self._places, *of_one), device="cpu")
        if not self.ragged:
            self.values[torch.from_numpy(rows)] = values.cpu()
            return
        of_batch, of_all = self._indices(rows, values.shape[1])
        self.values[of_all] = values.flatten(0, 1)[of_batch.to(values.device)].cpu()

    def load(self, block: Block) -> None:
        """Copy the values of a block of files."""
        if self.values is None:
            self.values = block.values.new_zeros((self._places, *block.values.shape[1:]))
        spans = np.diff(self.offsets)[block.rows] if self.ragged else np.ones(len(block.rows), np.int64)
        first = self.offsets[block.rows] if self.ragged else block.rows
        self.values[torch.from_numpy(places(first, spans))] = block.values[
            torch.from_numpy(places(block.starts, spans))
        ]

    def get(self, rows: np.ndarray) -> Tensor:
        """Return the cached values of these rows, zero in the padding."""
        assert self.values is not None
        if not self.ragged:
            return self.values[torch.from_numpy(rows)]
        longest = int(self.lengths[rows].max())
        states = self.values.new_zeros(len(rows) * longest, *self.values.shape[1:])
        of_batch, of_all = self._indices(rows, longest)
        states[of_batch] = self.values[of_all]
        return states.unflatten(0, (len(rows), longest))

    def _indices(self, rows: np.ndarray, longest: int) -> tuple[Tensor, Tensor]:
        """Return the positions of these rows' tokens in a batch of (rows * longest) tokens, and in all values."""
        lengths = self.lengths[rows]
        of_batch = places(np.arange(len(rows)) * longest, lengths)
        return torch.from_numpy(of_batch), torch.from_numpy(places(self.offsets[rows], lengths))


class Mapped:
    """The same, read from memory-mapped blocks whenever it is needed: the operating system decides what stays in memory."""

    def __init__(self, lengths: np.ndarray, ragged: bool, blocks: Sequence[Block]) -> None:
        self.lengths, self.ragged, self.blocks = lengths, ragged, blocks
        self.block = np.full(len(lengths), -1)
        self.starts = np.zeros(len(lengths), np.int64)
        for number, block in enumerate(blocks):
            self.block[block.rows] = number
            self.starts[block.rows] = block.starts

    @property
    def complete(self) -> bool:
        return bool((self.block >= 0).all())

    def get(self, rows: np.ndarray) -> Tensor:
        """Return the cached values of these rows, zero in the padding."""
        spans = self.lengths[rows] if self.ragged else np.ones(len(rows), np.int64)
        longest = int(spans.max())
        like = self.blocks[0].values
        states = like.new_zeros(len(rows) * longest, *like.shape[1:])
        for number in np.unique(self.block[rows]):
            chosen = np.flatnonzero(self.block[rows] == number)
            of_batch = places(chosen * longest, spans[chosen])
            of_block = places(self.starts[rows[chosen]], spans[chosen])
            values = self.blocks[number].values[torch.from_numpy(of_block)]
            states[torch.from_numpy(of_batch)] = values
        return states.unflatten(0, (len(rows), longest)) if self.ragged else states
