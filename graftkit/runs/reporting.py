"""Convert the live objects of a run to the plain values that `graftkit/report` takes."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from graftkit.backbone import Backbone
from graftkit.data.by_tokens import order_of
from graftkit.data.order import padding_share
from graftkit.engine.forward import Forward
from graftkit.errors import UserError
from graftkit.report.console import Console
from graftkit.report.values import Found, Sizes, Subject
from graftkit.runs.prepare import Prepared
from graftkit.tasks.base import Dataset


def show_cached(console: Console, forwards: Mapping[str, Forward]) -> None:
    """Print how many outputs of frozen layers were read from files, and how many computed."""
    for name, forward in forwards.items():
        if forward.filled is not None:
            console.line(f"frozen layers, {name} rows: {forward.filled}")


def found_in(prepared: Prepared, datasets: Mapping[str, Dataset], statistics: Mapping[str, Any]) -> Found:
    """Return what is shown before the first step. `statistics`: the task's, for each data split."""
    backbone, rows = prepared.backbone, prepared.rows
    chooses = rows.task.trains and prepared.recipe.train.evaluate_every != "end"
    parts = {"train": rows.train, "eval": rows.eval, "test": rows.test}
    return Found(
        model=backbone.source,
        model_class=type(backbone.model).__name__,
        blocks=len(backbone.blocks),
        width=width_of(backbone),
        sites=Counter(site.role for site in backbone.sites),
        rows={name: len(part) for name, part in parts.items() if part},
        columns=rows.columns,
        labels=rows.labels,
        skipped=rows.skipped,
        warnings=tuple(prepared.warnings),
        sizes=_sizes(prepared, datasets),
        statistics=statistics.get("train", {}),
        chosen_by=len(rows.eval) if rows.eval and chooses else None,
    )


def _sizes(prepared: Prepared, datasets: Mapping[str, Dataset]) -> Sizes:
    dataset = datasets["train"]
    lengths, padding = dataset.lengths, None
    if not dataset.uniform:
        order = order_of(dataset, prepared.settings, 0)
        batches = order.batches(0, len(order))
        padding = padding_share(lengths, batches)
    return Sizes(
        rows=len(dataset),
        unit=dataset.unit,
        total=int(lengths.sum()),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        padding=padding,
        truncated=sum(part.truncated for part in datasets.values()),
        truncated_of=sum(map(len, datasets.values())),
        max_length=prepared.max_length,
    )


def width_of(backbone: Backbone) -> int | None:
    """Return the hidden size; None if a user's own module does not declare it."""
    try:
        return backbone.hidden_size
    except UserError:
        return None


def subject_of(prepared: Prepared) -> Subject:
    """Return the subject of a run's model card."""
    rows, recipe, model = prepared.rows, prepared.recipe, prepared.backbone.model
    plain = hasattr(model, "config")
    return Subject(
        model=recipe.model,
        model_class=type(model).__name__,
        plain=plain,
        exports=plain and rows.task.trains,
        task=recipe.task,
        task_name=rows.task.name,
        method=str(prepared.graft.method),
        headline=tuple(rows.task.headline),
        predict=rows.task.predict_arguments(rows.columns),
        data=str(recipe.data.train),
        rows=len(rows.train),
        skipped=len(rows.train.skipped),
        columns=rows.columns,
        labels=rows.labels,
        batch_size=prepared.plan.batch_size,
        batch_tokens=prepared.plan.batch_tokens,
        optimizer=prepared.plan.optimizer if prepared.rows.task.trains else "",
        seed=recipe.seed,
        makes_model=rows.task.makes_model,
    )


LIBRARIES = ("graftkit", "torch", "transformers")


def versions() -> dict[str, str]:
    """Return the versions that a run was made with."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
