"""The validated rows of a table, as tasks pass them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graftkit.data.read import Table


@dataclass(frozen=True)
class Examples:
    """Validated rows of one table, and a message for each bad row that was skipped.

    `values`: one value per row for each of the task's columns. `targets`: one target per row, in a form of the task's
    choice; None for prediction.
    """

    table: Table
    values: dict[str, list[Any]]
    targets: Sequence[Any] | np.ndarray | None = None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def where(self, row: int) -> str:
        return self.table.where(row)

    def take(self, rows: Sequence[int]) -> Examples:
        targets = self.targets
        if targets is not None:
            targets = targets[list(rows)] if isinstance(targets, np.ndarray) else [targets[i] for i in rows]
        values = {name: [column[i] for i in rows] for name, column in self.values.items()}
        return replace(self, table=self.table.take(rows), values=values, targets=targets)
