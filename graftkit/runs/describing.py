"""Write what people read of a finished run: its worst examples, their pictures and sounds, and the model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from graftkit.errors import UserError
from graftkit.files import write_json, write_text
from graftkit.report.card import model_card
from graftkit.runs.folder import CARD, PREVIEWS, WORST
from graftkit.runs.inputs import forced
from graftkit.runs.prepare import Prepared
from graftkit.runs.reporting import subject_of, versions
from graftkit.tasks.base import Dataset, Examples, Task


def facts(prepared: Prepared, datasets: Mapping[str, Dataset], folder: Path) -> dict[str, Any]:
    """Return what result.json says of a run that was known before its first step."""
    plan, rows = prepared.plan, prepared.rows
    return {
        "never_trained_parameters": plan.never_trained_parameters,
        "total_parameters": plan.total_parameters,
        "precision": plan.precision,
        "device": str(prepared.device),
        "task": prepared.recipe.task,
        "headline": list(rows.task.headline),
        "method": str(prepared.graft.method) or "none",
        "optimizer": plan.optimizer,
        "rows_truncated": sum(dataset.truncated for dataset in datasets.values()),
        "rows_skipped": len(rows.skipped),
        "warnings": prepared.warnings,
        "changed_when_resumed": forced(folder),
        "versions": versions(),
    }


def describe(
    prepared: Prepared, datasets: Mapping[str, Dataset], folder: Path, result: dict[str, Any], found: dict[str, Any],
    worst: list[dict[str, Any]], reporting: Callable[[str], AbstractContextManager[None]],
) -> None:  # fmt: skip
    """Write the files for human readers. The graft is already saved; no failure here may cost the run, so each is within
    `reporting`, which catches it."""
    if found:
        with reporting(f"writing {WORST}"):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in worst)
            write_text(folder / WORST, "".join(lines))
        with reporting(f"writing {PREVIEWS}"):
            # the rows that were evaluated last
            examples = next((datasets[name].examples for name in ("test", "eval") if name in datasets), None)
            shown = previews(prepared.rows.task, examples, worst)
            if any(shown):
                write_json(folder / PREVIEWS, shown)
    with reporting(f"writing the model card ({CARD})"):
        rows = prepared.rows
        about = {name: rows.task.statistics(dataset, rows.labels) for name, dataset in datasets.items()}
        write_text(folder / CARD, model_card(subject_of(prepared), result, found, worst, about))


def previews(
    task: Task, examples: Examples | None, worst: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """Return pictures and sounds of the worst of some examples, as data URIs, for the report; an example that can no
    longer be read has none."""
    if examples is None:
        return []
    rows = {examples.where(row): row for row in range(len(examples))} if worst else {}
    found = []
    for one in worst:
        try:
            found.append(task.preview(examples, rows[one["where"]]))
        except (UserError, KeyError, OSError):
            found.append({})
    return found
