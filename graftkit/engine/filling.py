"""Fill a cache with the activations of a frozen prefix: from files of earlier runs, and by computing what is missing.

Rows that are missing are computed in batches of 64, the longest first, and files hold whole batches. A run that is killed
while it fills its cache therefore computes the rest in the same batches when it is resumed, and gets the same values, bit for
bit. In other batches, as when only ten rows of a file are new, a row is padded differently, and its values differ by
rounding.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.data.order import ordered_batches
from graftkit.data.ragged import places
from graftkit.engine.blocks import Block, Blocks, prune
from graftkit.engine.heap import Heap
from graftkit.engine.kept import Kept, Mapped
from graftkit.engine.memory import in_parts, release
from graftkit.engine.parallel import all_agree, gather, processes, wait
from graftkit.errors import Note, UserError
from graftkit.files import checksum

ADVICE = "lower data.max_length."
FILL_BATCH = 64
BLOCK = 1 << 26  # bytes of a file, about
PATIENCE = 10.0  # seconds of work that a killed process may lose
WORTHWHILE = 1.0  # seconds of work that are worth a file
# largest difference of a stored value from one computed in another batch, relative to the largest value of the row: of
# what is computed in fp32, and in other types, in whatever type it is stored
SAME_FP32, SAME_ROUNDED = 1e-3, 0.05


@dataclass(frozen=True)
class Filled:
    """What filling a cache took. `read`, `computed`: rows; `seconds` in total; `bytes` of all values; `place`: 'memory'
    or 'disk'; `digest`: of values in memory."""

    read: int
    computed: int
    seconds: float
    bytes: int
    place: str
    digest: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows_read": self.read, "rows_computed": self.computed, "seconds": round(self.seconds, 3),
            "bytes": self.bytes, "place": self.place,
        }  # fmt: skip

    def __str__(self) -> str:
        read = f"{self.read:,} read from files, " if self.read else ""
        return f"{read}{self.computed:,} computed in {self.seconds:.1f} s, {self.bytes / 1e6:,.1f} MB in {self.place}"


class NotKept(Exception):
    """Values cannot be kept on disk, and do not fit into memory."""


class Filling:
    """The work of filling one cache.

    `capture` computes the values of some rows, padded; `lengths` (rows,); `blocks`: the files, if values are kept on disk;
    `in_memory`: hold all values, otherwise only map the files. `precision`: the number type of the products, by which values
    differ that are computed in different batches; `written`: write files however little work they save.
    """

    def __init__(
        self, capture: Callable[[np.ndarray], Tensor], lengths: np.ndarray, ragged: bool, blocks: Blocks | None,
        device: torch.device, in_memory: bool, precision: str = "fp32", written: bool = False,
    ) -> None:  # fmt: skip
        self.same = SAME_FP32 if precision == "fp32" else SAME_ROUNDED
        self.capture, self.lengths, self.ragged, self.blocks = capture, lengths, ragged, blocks
        self.device, self.in_memory = device, in_memory
        self.kept = Kept(lengths, ragged)
        self.pending: list[tuple[np.ndarray, Tensor]] = []
        self.held = 0  # bytes pending
        self.worth = written or not in_memory or (blocks is not None and blocks.begun)
        self.began = self.flushed = time.monotonic()

    def run(self) -> tuple[Kept | Mapped, Filled]:
        """Fill the cache in all processes together: each computes a share of what is missing. Raises `NotKept`."""
        index, world = processes()
        found = self._found()
        have = np.zeros(len(self.lengths), bool)
        for block in found:
            have[block.rows] = True
        views = gather(have) if world > 1 else [have]
        shared = all((one == views[0]).all() for one in views)  # otherwise the first process decides
        missing = np.flatnonzero(~views[0])
        heap = Heap(self.device)
        for batch in ordered_batches(self.lengths[missing], FILL_BATCH)[index::world]:
            if self.blocks is None and not self.in_memory:
                break
            self._compute(missing[batch])
            heap.after_pass()
        self._flush(last=True)
        if len(missing):
            release(self.device)  # what these passes took is not what the steps will take
        kept = self._in_memory(found, shared, len(missing)) if self.in_memory else self._mapped()
        size = _size(kept)
        seconds = time.monotonic() - self.began
        filled = Filled(
            len(have) - len(missing), len(missing), seconds, size, "memory" if self.in_memory else "disk"
        )
        return kept, filled

    def _found(self) -> list[Block]:
        """Return the blocks of earlier runs, unless they are not what the model computes now."""
        found = self.blocks.find() if self.blocks is not None else []
        if not all_agree(not found or self._agree(found)):
            if found:
                assert self.blocks is not None
                self.blocks.refuse()
            return []
        return found

    def _agree(self, found: list[Block]) -> bool:
        """Return whether the longest and the shortest stored row are what the model computes, up to rounding."""
        stored = np.concatenate([block.rows for block in found])
        rows = np.unique(stored[[self.lengths[stored].argmax(), self.lengths[stored].argmin()]])
        computed = self.capture(rows).cpu()
        kind = computed.shape[1 + self.ragged :], computed.dtype
        if any((block.values.shape[1:], block.values.dtype) != kind for block in found):
            return False
        known = Mapped(self.lengths, self.ragged, found).get(rows)
        for row, value, wanted in zip(rows, known.float(), computed.float()):
            if self.ragged:
                value, wanted = value[: self.lengths[row]], wanted[: self.lengths[row]]
            if not (value - wanted).abs().max() <= self.same * wanted.abs().max():
                return False
        return True

    def _compute(self, rows: np.ndarray) -> None:
        """Compute the values of a batch. Only whole batches are written."""
        parts = [(part, values.cpu()) for part, values in in_parts(rows, self.device, self.capture, ADVICE)]
        for part, values in parts:
            if self.in_memory:
                self.kept.put(part, values)
            if self.blocks is not None:
                self.pending.append((part, self._without_padding(part, values)))
                self.held += self.pending[-1][1].nbytes
        now = time.monotonic()
        self.worth = self.worth or now - self.began > WORTHWHILE
        if self.held > BLOCK or now - self.flushed > PATIENCE:
            self._flush()

    def _without_padding(self, rows: np.ndarray, values: Tensor) -> Tensor:
        if not self.ragged:
            return values
        chosen = places(np.arange(len(rows)) * values.shape[1], self.lengths[rows])
        return values.flatten(0, 1)[torch.from_numpy(chosen)]

    def _flush(self, last: bool = False) -> None:
        """Write what is pending as a file, if it took long enough to compute."""
        if self.blocks is None or not self.pending or not (self.worth or (self.held > BLOCK and not last)):
            return
        rows = np.concatenate([rows for rows, _ in self.pending])
        values = torch.cat([values for _, values in self.pending])
        self.pending, self.held, self.flushed = [], 0, time.monotonic()
        try:
            self.blocks.write(rows, values)
        except UserError as error:
            self.blocks = None
            warnings.warn(Note(f"activations are not kept on disk: {error}"), stacklevel=2)
        else:
            prune()

    def _in_memory(self, found: list[Block], shared: bool, missing: int) -> Kept:
        index, world = processes()
        if not shared and index == 0:
            for block in found:
                self.kept.load(block)
        if world > 1 and (missing or not shared):
            self.kept.exchange()
        if shared:
            for block in found:
                self.kept.load(block)
        return self.kept

    def _mapped(self) -> Mapped:
        wait()
        found = self.blocks.find() if self.blocks is not None else []
        kept = Mapped(self.lengths, self.ragged, found)
        if not all_agree(kept.complete):
            raise NotKept
        return kept


def _size(kept: Kept | Mapped) -> int:
    if isinstance(kept, Mapped):
        return sum(block.values.nbytes for block in kept.blocks)
    return 0 if kept.values is None else kept.values.nbytes


def _digest(kept: Kept | Mapped) -> str | None:
    """Return a digest of values in memory, which tells a resumed run whether they are those that it began with."""
    if isinstance(kept, Mapped) or kept.values is None:
        return None
    return checksum({"values": kept.values}, {})
