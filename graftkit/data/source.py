"""What training and prediction read: rows of tensors by their numbers, the same for whoever asks and whenever.

A source never hands out "the next" batch. `batch` is a function of row numbers and of the pass over the rows, and the
order of the rows is a function of (seed, epoch); so the step number is the whole position of a run, resuming costs
nothing whatever the size, and neither threads nor processes change what is learned.
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
    """One pass over the rows. Whatever is drawn at random in it is a function of (seed, epoch, row)."""

    seed: int = 0
    epoch: int = 0

    def generator(self, row: int, *stream: int) -> np.random.Generator:
        """The random numbers of a row in this pass; `stream`: numbers that tell several uses apart."""
        return np.random.Generator(np.random.SFC64([self.seed, self.epoch, int(row), *stream]))


class Batch:
    """Some rows of a source on a device. `inputs` and `targets` are made when first asked for, and once.

    Cached activations of a frozen prefix often make `inputs` unnecessary.
    """

    def __init__(
        self, source: Source, rows: np.ndarray, device: torch.device | None = None, at: Pass | None = None
    ) -> None:
        self.source = source
        self.rows = rows
        self.device = device
        self.at = at or Pass()

    @cached_property
    def host_inputs(self) -> dict[str, Tensor]:
        """What the model is called with, in the memory of the host."""
        return self.source.inputs(self.rows, self.at)

    @cached_property
    def host_targets(self) -> Tensor | None:
        return self.source.targets(self.rows)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with, on the device of the batch."""
        return {name: self.move(tensor) for name, tensor in self.host_inputs.items()}

    @cached_property
    def targets(self) -> Tensor | None:
        return None if self.host_targets is None else self.move(self.host_targets)

    def prepare(self, inputs: bool = True) -> None:
        """Make what the batch holds ahead of its step, in pinned memory where a GPU will copy it."""
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
    """Rows as a model takes them, by number from 0.

    `lengths`: the size of each row, in tokens where it has any, so that rows of like size share a batch; or one size for
    all, and then nothing is held for each row. `truncated`: how many rows lost something because they are longer
    than the model takes.
    """

    unit: ClassVar[str] = "tokens"  # of `lengths`
    uniform: bool = False  # inputs of all rows have one shape, so that nothing is padded
    keeps: bool = (
        True  # a row is the same in each epoch and is one row for the model: its activations may be cached
    )
    truncated: int = 0
    lengths: np.ndarray | int

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, rows: np.ndarray, device: torch.device | None = None, at: Pass | None = None) -> Batch:
        """The rows of these numbers in a pass, on a device."""
        return Batch(self, rows, device, at)

    def order(self, batch_size: int, seed: int, epoch: int) -> Order:
        """The batches of row numbers of an epoch."""
        if isinstance(self.lengths, int):
            return Permuted(len(self), batch_size, seed, epoch)
        return ByLength(self.lengths, batch_size, seed, epoch)

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        """What the model is called with for these rows, on the host. A pure function of its arguments: it may be called in
        another thread, and what it draws at random comes from `at.generator(row)`.
        """
        raise NotImplementedError

    def targets(self, rows: np.ndarray) -> Tensor | None:
        """What the loss of these rows is computed from; None where they have none."""
        return None

    def count(self, rows: np.ndarray, at: Pass) -> Mapping[str, float]:
        """The units of each term of the loss in these rows: rows, or target tokens. Known before the rows are made, since
        the loss of a step is the sum over all its batches divided by the units of all of them.
        """
        return {LOSS: float(len(rows))}

    def tokens(self, rows: np.ndarray) -> int:
        """The size of these rows together, without padding."""
        return self.lengths * len(rows) if isinstance(self.lengths, int) else int(self.lengths[rows].sum())

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        """Call the model on a batch: once, once for each choice, or only at the places that have labels."""
        output: Any = model(**batch.inputs)
        return output if isinstance(output, Tensor) else output.logits

    def where(self, row: int) -> str:
        """The place of a row in what the user handed over."""
        return f"row {row + 1}"

    def digest(self) -> str:
        """Of all that a run learns from; another one tells that the rows are not those that a run began with."""
        raise NotImplementedError
