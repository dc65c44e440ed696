"""What a task is: which columns, how rows become tensors, which loss and metrics, how outputs become answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.catalogue import as_expression, check_values
from graftkit.data.columns import Column
from graftkit.data.encode import Encoded
from graftkit.data.read import Table


@dataclass
class Batch:
    """Some rows of a dataset: `targets` (rows,), and `inputs`, tensors (rows, length), padded when first asked for."""

    encoded: Encoded
    rows: np.ndarray
    targets: Tensor | None
    device: torch.device | None = None

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        padded = self.encoded.pad(self.rows.tolist())
        if self.device is None:
            return padded
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in padded.items()}

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        targets = None if self.targets is None else self.targets.to(device)
        return Batch(self.encoded, self.rows, targets, device)


@dataclass(frozen=True)
class Examples:
    """Checked rows of one table: texts, pairs and targets of one length, and where each row came from."""

    table: Table
    texts: list[str]
    pairs: list[str] | None
    targets: np.ndarray | None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, row: int) -> str:
        return self.table.where(row)


@dataclass(frozen=True)
class Dataset:
    """Encoded rows with their targets."""

    examples: Examples
    encoded: Encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def batch(self, rows: np.ndarray) -> Batch:
        targets = self.examples.targets
        return Batch(self.encoded, rows, None if targets is None else torch.from_numpy(targets[rows]))


class Task:
    """Base of all tasks. Subclasses are frozen dataclasses whose fields are declared with `option`."""

    columns: ClassVar[tuple[Column, ...]] = ()

    def __post_init__(self) -> None:
        check_values(self, "task")

    def __str__(self) -> str:
        return as_expression(self)

    @property
    def name(self) -> str:
        return type(self).__module__.rsplit(".", 1)[-1]

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        """The answers there are, from the training table."""
        raise NotImplementedError

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        """Rows checked one by one; a bad row is a `UserError`, or left out where `skip_bad` says so."""
        raise NotImplementedError

    def dataset(self, examples: Examples, backbone: Backbone, max_length: int) -> Dataset:
        raise NotImplementedError

    def weights(self, targets: np.ndarray, classes: int) -> Tensor | None:
        """Weight of each class in the loss, or None."""
        return None

    def row_losses(
        self, logits: Tensor, targets: Tensor, label_smoothing: float, weights: Tensor | None
    ) -> Tensor:
        """Loss of each row, (rows,), in fp32."""
        raise NotImplementedError

    def metrics(self, logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
        raise NotImplementedError

    def answers(self, logits: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
        raise NotImplementedError
