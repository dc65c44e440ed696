"""The plain values that reports are made of; `graftkit/runs` fills them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Lengths of the training rows, in `unit`, and the number of truncated rows over all data splits.

    `padding`: the fraction of the batches that is padding; None if all rows have the same shape.
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

    `width`: the hidden size, if the model declares it. `sites`: the number of each role. `rows`: the number in each data
    split. `skipped`: a message for each bad row that was skipped. `warnings`: problems that do not stop a run.
    `statistics`: the task's, of the training rows. `chosen_by`: the number of evaluation rows that select the best
    weights; None if no selection takes place.
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
    """A problem or a warning. `data`: train, eval, test or recipe; `place`: 'line 17' of the file, if there is one."""

    data: str
    file: str
    place: str
    text: str


@dataclass(frozen=True)
class Check:
    """What `data check` found. `rows`: the number of good and bad rows in each data split.

    `duplicates`, `leaks`: rows that repeat one of their own or of another data split. `suspects`, `outliers`: rows whose
    label is likely wrong, and rows far from all others, worst first; None unless labels were checked. `columns`: the
    columns of the files that the task uses.
    """

    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    statistics: dict[str, Any] = field(default_factory=dict)
    duplicates: list[dict[str, Any]] = field(default_factory=list)
    leaks: list[dict[str, Any]] = field(default_factory=list)
    suspects: list[dict[str, Any]] | None = None
    outliers: list[dict[str, Any]] | None = None
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok, "problems": [vars(one) for one in self.problems],
            "warnings": [vars(one) for one in self.warnings], "rows": self.rows, "labels": list(self.labels),
            "statistics": self.statistics, "columns": self.columns, "duplicates": self.duplicates, "leaks": self.leaks,
            **({} if self.suspects is None else {"suspects": self.suspects, "outliers": self.outliers}),
        }  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """The contents of a model card, besides the run's result and metrics.

    `task` and `method` are expressions; `model` and `data` are as written in the recipe. `model_class` is a class of
    transformers if `plain`; `exports`: whether the run can be exported. `predict`: the arguments of
    `graftkit predict RUN`. `skipped`: the number of bad training rows skipped. `makes_model`: the run ends with a plain
    model instead of predictions.
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
    optimizer: str  # empty if nothing is trained
    seed: int
    makes_model: bool = False
    batch_tokens: int | None = None
