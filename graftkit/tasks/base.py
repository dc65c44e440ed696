"""What a task is: which columns, how rows become tensors, which loss and metrics, how outputs become answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.catalogue import as_expression, check_values
from graftkit.data.columns import Column
from graftkit.data.encode import Encoded
from graftkit.data.read import Table


@dataclass(frozen=True)
class Batch:
    """Model inputs by name, (rows, length); targets (rows,); and the row numbers they came from."""

    inputs: dict[str, Tensor]
    targets: Tensor | None
    rows: np.ndarray

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Batch(inputs, None if self.targets is None else self.targets.to(device), self.rows)


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
        return Batch(
            self.encoded.pad(rows.tolist()),
            None if targets is None else torch.from_numpy(targets[rows]),
            rows,
        )


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
        self, table: Table, columns: dict[str, str], labels: Sequence[str], skip_bad: bool, targets: bool = True
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
