"""What an exporter is: it writes a run as something else, and another tool gives the run's answers with what it wrote."""

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
    """What an exporter is given: a run in memory, in fp32 and in eval mode, on `device`.

    `model`: the backbone as the recipe names it; `base`: its folder, None for a module of a user's own; `quantize`: how its
    frozen weights are stored, where they are quantized. `columns`: those of the task that rows have.
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
    """Rows to compare answers on; `real`: they are the run's, not made up."""

    dataset: Dataset
    real: bool

    @property
    def rows(self) -> np.ndarray:
        """The numbers of the first rows, 64 at most."""
        return np.arange(min(ROWS, len(self.dataset)))


class Exporter(Protocol):
    """Writes runs in one format. Nothing is written where `refuse` raises an error."""

    def refuse(self, run: Exportable) -> None:
        """Raise `UserError` for a run that the format has no place for, before any row is read."""
        ...

    def write(self, run: Exportable, folder: Path) -> None:
        """Write the run, whose graft is folded, into `folder`; the card and the list of files come beside."""
        ...

    def outputs(self, run: Exportable, folder: Path, sample: Sample) -> list[Tensor]:
        """Load what was written with the other tool; its logits for each row of the sample alone, in fp32."""
        ...

    def how(self, run: Exportable, to: Path) -> str:
        """How a person loads what is in `to`: a line of Python or a command."""
        ...

    def native(self, run: Exportable) -> bool:
        """Whether the other tool needs no code beside its own."""
        ...


@torch.no_grad()
def logits(model: nn.Module, sample: Sample, device: torch.device) -> list[Tensor]:
    """The logits of a model on `device` for each row of the sample alone, in fp32."""
    dataset = sample.dataset
    batches = (dataset.batch(sample.rows[i : i + 1], device) for i in range(len(sample.rows)))
    return [dataset.call(model, batch).float().cpu() for batch in batches]


@dataclass(frozen=True)
class Comparison:
    """Logits of the run and of the other tool: the largest difference, and whether their largest are at one place."""

    difference: float
    same_answers: bool


def compare(run: Sequence[Tensor], exported: Sequence[Tensor]) -> Comparison:
    """Raises `UserError` where a logit differs by more than 1e-4 of the largest one."""
    difference = max(float((a - b).abs().max()) for a, b in zip(exported, run, strict=True))
    if not difference <= TOLERANCE * max(1.0, *(float(b.abs().max()) for b in run)):
        raise UserError(
            f"the exported model differs from the run by {difference:.2g} in its logits on {len(run)} rows, "
            "so nothing was written. Please report this with the recipe."
        )
    same = all(bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in zip(exported, run))
    return Comparison(difference, same)
