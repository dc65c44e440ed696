"""The exporter interface: write a run in another format, and check that the other tool gives the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.errors import UserError
from graftkit.grafts.graft import Graft
from graftkit.tasks.base import Dataset, Task

ROWS = 64  # real rows on which an export and its run are compared
TOLERANCE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Exportable:
    """A run in memory, in fp32 and eval mode, on `device`: the input of an exporter.

    `model`: the backbone as written in the recipe; `base`: its folder, None for a user's own module; `quantize`: how its
    frozen weights are quantized, if they are. `columns`: the task's columns that the rows have.
    """

    graft: Graft
    backbone: Backbone
    task: Task
    labels: tuple[str, ...]
    columns: dict[str, str]
    max_length: int
    device: torch.device
    model: str
    base: Path | None
    quantize: str | None


@dataclass(frozen=True)
class Sample:
    """Rows to compare answers on; `real`: they come from the run's data, and are not made up."""

    dataset: Dataset
    real: bool

    @property
    def rows(self) -> np.ndarray:
        """The numbers of the first rows, at most 64."""
        return np.arange(min(ROWS, len(self.dataset)))


class Exporter(Protocol):
    """A writer of runs in one format. Nothing is written if `refuse` raises an error."""

    @property
    def opened_by(self) -> tuple[str, ...]:
        """The files without which the other tool does not open the folder."""
        ...

    def refuse(self, run: Exportable) -> None:
        """Raise `UserError` for a run that the format cannot represent, before any row is read."""
        ...

    def write(self, run: Exportable, folder: Path) -> None:
        """Write the run, whose graft is folded, into `folder`; the caller adds the card and the file list."""
        ...

    def outputs(self, run: Exportable, folder: Path, sample: Sample) -> list[Tensor]:
        """Load the export with the other tool. Return its logits for each sample row on its own, in fp32."""
        ...

    def how(self, run: Exportable, to: Path) -> str:
        """Return how to load the export in `to`: a line of Python or a command."""
        ...

    def native(self, run: Exportable) -> bool:
        """Return whether the other tool needs no extra code."""
        ...


@torch.no_grad()
def logits(model: nn.Module, sample: Sample, device: torch.device) -> list[Tensor]:
    """Return the logits of a model on `device` for each sample row on its own, in fp32."""
    dataset = sample.dataset
    batches = (dataset.batch(sample.rows[i : i + 1], device) for i in range(len(sample.rows)))
    return [dataset.call(model, batch).float().cpu() for batch in batches]


@dataclass(frozen=True)
class Comparison:
    """The largest difference between the logits of run and export, and whether the argmax is always the same."""

    difference: float
    same_answers: bool


def compare(run: Sequence[Tensor], exported: Sequence[Tensor]) -> Comparison:
    """Compare logits. Raises `UserError` if any differs by more than 1e-4 of the largest one."""
    difference = max(float((a - b).abs().max()) for a, b in zip(exported, run, strict=True))
    if not difference <= TOLERANCE * max(1.0, *(float(b.abs().max()) for b in run)):
        raise UserError(
            f"the exported model differs from the run by {difference:.2g} in its logits on {len(run)} rows, "
            "so nothing was written. Please report this together with the recipe."
        )
    same = all(bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in zip(exported, run))
    return Comparison(difference, same)
