"""What reports are made of: plain values, which `graftkit/runs` fills in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """How long the training rows are, in `unit`, and how many rows of all parts of the data were cut.

    `padding`: the share of the batches that is padding; None where all rows have one shape.
    """

    rows: int
    unit: str
    total: int
    mean: float
    longest: int
    padding: float | None
    truncated: int
    truncated_of: int
    max_length: int


@dataclass(frozen=True)
class Found:
    """What a run found before its first step.

    `width`: of the states, where the model tells it. `sites`: how many of each role. `rows`: of each part of the data.
    `skipped`: a message for each bad row that was left out. `warnings`: what does not stop a run. `statistics`: of the
    training rows, as the task gives them. `chosen_by`: how many evaluation rows choose the best weights; None where nothing is chosen.
    """

    model: str
    model_class: str
    blocks: int
    width: int | None
    sites: Mapping[str, int]
    rows: Mapping[str, int]
    columns: Mapping[str, str]
    labels: tuple[str, ...]
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]
    sizes: Sizes
    statistics: Mapping[str, Any]
    chosen_by: int | None


@dataclass(frozen=True)
class Finding:
    """A problem or a warning. `data`: train, eval, test or recipe; `place`: 'line 17' of the file, where it has one."""

    data: str
    file: str
    place: str
    text: str


@dataclass(frozen=True)
class Check:
    """What `data check` found. `rows`: of each part of the data, how many are good, and how many are bad."""

    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok, "problems": [vars(one) for one in self.problems],
            "warnings": [vars(one) for one in self.warnings], "rows": self.rows, "labels": list(self.labels),
            "statistics": self.statistics,
        }  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What a model card is about, beside the run's result and figures.

    `task` and `method` are expressions, `model` and `data` as the recipe names them. `model_class` is a class of
    transformers where `plain` says so; `exports`: `graftkit export` has something to write. `predict`: what
    `graftkit predict RUN` takes. `skipped`: how many bad training rows were left out.
    """

    model: str
    model_class: str
    plain: bool
    exports: bool
    task: str
    task_name: str
    method: str
    headline: tuple[str, ...]
    predict: str
    data: str
    rows: int
    skipped: int
    columns: Mapping[str, str]
    labels: tuple[str, ...]
    batch_size: int
    optimizer: str  # empty where nothing is trained
    seed: int
