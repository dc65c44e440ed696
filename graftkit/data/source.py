"""Sources of training and prediction data: rows of tensors with random access by row number.

A source has no notion of "the next" batch. `batch` is a pure function of row numbers and of the pass over the rows, and
the order of the rows is a function of (seed, epoch). So the step number fully determines the position of a run, resuming
is free for any size of data, and neither threads nor processes change the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.data.order import ByLength, Order, Permuted

LOSS = "loss"  # name of the one term of most losses


@dataclass(frozen=True)
class Pass:
    """One pass over the rows. All random draws in it are functions of (seed, epoch, row).

    `progress`: the fraction of the run's steps that are done, for what follows a schedule; 0 outside of training.
    """

    seed: int = 0
    epoch: int = 0
    progress: float = 0.0

    def generator(self, row: int, *stream: int) -> np.random.Generator:
        """Return the random generator of a row in this pass; `stream`: numbers that distinguish several uses."""
        return np.random.Generator(np.random.SFC64([self.seed, self.epoch, int(row), *stream]))


def identity_of(values: Mapping[str, np.ndarray | bytes | str]) -> bytes:
    """Return bytes that differ if a name, a type, a shape or a value differs."""
    parts = []
    for name, value in sorted(values.items()):
        kind = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        held = value.tobytes() if isinstance(value, np.ndarray) else value
        held = held.encode("utf-8", "surrogatepass") if isinstance(held, str) else held
        parts.append(f"{name} {kind} {len(held)};".encode() + held)
    return b"".join(parts)


class Batch:
    """Some rows of a source on a device. `inputs` and `targets` are computed lazily, once.

    Cached activations of a frozen prefix often make `inputs` unnecessary.
    """

    def __init__(
        self, source: Source, rows: np.ndarray, device: torch.device | None = None, at: Pass | None = None
    ) -> None:
        self.source = source
        self.rows = rows
        self.device = device
        self.at = at or Pass()
        self.fetched: Any = None  # activations of a frozen prefix, if a forward pass has fetched them ahead

    @cached_property
    def host_inputs(self) -> dict[str, Tensor]:
        """The model inputs in host memory."""
        return self.source.inputs(self.rows, self.at)

    @cached_property
    def host_targets(self) -> Tensor | None:
        return self.source.targets(self.rows)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """The model inputs on the device of the batch."""
        return {name: self.move(tensor) for name, tensor in self.host_inputs.items()}

    @cached_property
    def targets(self) -> Tensor | None:
        return None if self.host_targets is None else self.move(self.host_targets)

    def prepare(self, inputs: bool = True) -> None:
        """Compute the contents of the batch ahead of its step, in pinned memory if its device is a GPU."""
        pin = self.device is not None and self.device.type == "cuda"
        if inputs and pin:
            self.host_inputs = {name: tensor.pin_memory() for name, tensor in self.host_inputs.items()}
        elif inputs:
            self.host_inputs  # noqa: B018
        if self.host_targets is not None and pin:
            self.host_targets = self.host_targets.pin_memory()

    def move(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device, non_blocking=True)


class Source:
    """Rows of model inputs, numbered from 0.

    `lengths`: the size of each row, in tokens if it has any, so that rows of similar size share a batch; or a single size
    for all rows, in which case no memory is needed per row. `truncated`: number of rows that were truncated because the
    model cannot take them whole.
    """

    unit: ClassVar[str] = "tokens"  # of `lengths`
    uniform: bool = False  # inputs of all rows have one shape, so that nothing is padded
    keeps: bool = (
        True  # a row is the same in each epoch and is one row for the model: its activations may be cached
    )
    views: int = (
        1  # a row is the same in each epoch of equal remainder by this number, from random draws if above 1
    )
    truncated: int = 0
    lengths: np.ndarray | int

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, rows: np.ndarray, device: torch.device | None = None, at: Pass | None = None) -> Batch:
        """Return the batch of these row numbers in a pass, on a device."""
        return Batch(self, rows, device, at)

    def order(self, batch_size: int, seed: int, epoch: int) -> Order:
        """Return the batches of row numbers of an epoch."""
        if isinstance(self.lengths, int):
            return Permuted(len(self), batch_size, seed, epoch)
        return ByLength(self.lengths, batch_size, seed, epoch)

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        """Return the model inputs for these rows, on the host. Must be a pure function of its arguments: it may be called
        in another thread, and random numbers must come from `at.generator(row)`.
        """
        raise NotImplementedError

    def targets(self, rows: np.ndarray) -> Tensor | None:
        """Return the targets of these rows; None if they have none."""
        return None

    def count(self, rows: np.ndarray, at: Pass) -> Mapping[str, float]:
        """Return the number of units of each loss term in these rows: rows, or target tokens. Must be known before the
        batch is computed, because the loss of a step is the sum over its batches divided by the units of all of them.
        """
        return {LOSS: float(len(rows))}

    def tokens(self, rows: np.ndarray) -> int:
        """Return the total size of these rows, without padding."""
        return self.lengths * len(rows) if isinstance(self.lengths, int) else int(self.lengths[rows].sum())

    def padded_length(self, rows: np.ndarray) -> int:
        """Return the length that these rows are padded to."""
        if isinstance(self.lengths, int):
            return self.lengths
        return int(self.lengths[rows[:1] if self.uniform else rows].max())

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        """Call the model on a batch: once, once per choice, or only at positions with labels."""
        output: Any = model(**batch.inputs)
        return output if isinstance(output, Tensor) else output.logits

    def identity(self, row: int, at: Pass) -> bytes | None:
        """Return bytes that determine the model inputs of a row in a pass, whatever else the source contains; None if there
        are none, so that cached activations of the row serve this run alone.
        """
        return None

    def where(self, row: int) -> str:
        """Return the position of a row in the user's data."""
        return f"row {row + 1}"

    def warnings(self) -> list[str]:
        """Return what the model may not be able to read in these rows."""
        return []

    def digest(self) -> str:
        """Return a digest of all training data; if it differs on resuming, the rows are not those the run started with."""
        raise NotImplementedError
