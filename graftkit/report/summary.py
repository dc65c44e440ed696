"""What a run found, will cost, and gave, for the terminal. No torch here: it reads plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from graftkit.data.batches import epoch_batches, padding_share
from graftkit.errors import UserError
from graftkit.report.console import Console, count, duration, size

if TYPE_CHECKING:
    from graftkit.backbone import Backbone
    from graftkit.plan import Plan
    from graftkit.prepare import Prepared
    from graftkit.tasks.base import Dataset


def show_found(console: Console, prepared: Prepared, datasets: dict[str, Dataset] | None = None) -> None:
    """Backbone, sites, labels, rows."""
    backbone, rows = prepared.backbone, prepared.rows
    roles = Counter(site.role for site in backbone.sites)
    console.heading("Found")
    parts = [f"{len(rows.train):,} train"]
    parts += [f"{len(part):,} {name}" for name, part in (("eval", rows.eval), ("test", rows.test)) if part]
    columns = ", ".join(f"{name} = {column!r}" for name, column in rows.columns.items())
    lines = [
        (
            "backbone",
            f"{backbone.source} ({type(backbone.model).__name__}, {len(backbone.blocks)} blocks{_width(backbone)})",
        ),
        ("sites", ", ".join(f"{number} {role}" for role, number in roles.items())),
        ("rows", f"{', '.join(parts)}; columns {columns}"),
        (
            "labels",
            f"{len(rows.labels)}: {', '.join(rows.labels[:4])}{' ...' if len(rows.labels) > 4 else ''}",
        ),
    ]
    if rows.skipped:
        lines.append(("left out", f"{len(rows.skipped)} bad rows, the first: {rows.skipped[0]}"))
    if datasets:
        cut = sum(dataset.encoded.truncated for dataset in datasets.values())
        total = sum(map(len, datasets.values()))
        lengths = datasets["train"].encoded.lengths
        batches = epoch_batches(lengths, prepared.settings.batch_size, prepared.settings.seed, 0)
        text = (
            f"{lengths.sum():,} tokens, {lengths.mean():.1f} a row, longest {lengths.max()}, "
            f"{padding_share(lengths, batches):.1%} padding"
        )
        if cut:
            text += (
                f"; {cut:,} of {total:,} rows are longer than {prepared.max_length} tokens and were truncated"
            )
        lines.append(("texts", text))
    console.pairs(lines)


def _width(backbone: Backbone) -> str:
    try:
        return f", width {backbone.hidden_size}"
    except UserError:  # a user's own module need not tell
        return ""


def show_plan(console: Console, plan: Plan) -> None:
    """Exact counts before the first step."""
    share = plan.trained_parameters / plan.total_parameters
    groups = ", ".join(f"{name} {count(number)}" for name, number in plan.groups.items())
    schedule = [("schedule", text) for text in _schedule(plan)]
    console.heading("Plan")
    console.pairs(
        [
            ("method", plan.method),
            ("trained", f"{count(plan.trained_parameters)} of {count(plan.total_parameters)} parameters ({share:.2%}): {groups}"),
            *schedule,
            ("frozen", f"the first {plan.frozen_blocks} of {plan.blocks} blocks are computed without gradients"),
            ("memory", f"weights {size(plan.weight_bytes)}, gradients {size(plan.gradient_bytes)}, "
                       f"optimizer {size(plan.optimizer_bytes)}; activations come on top"),
            ("steps", f"{count(plan.steps)} of {plan.batch_size} rows ({count(plan.steps_per_epoch)} an epoch), {plan.precision}"),
        ]
    )  # fmt: skip


def _schedule(plan: Plan) -> Iterator[str]:
    """What is trained from which step on, and whether the run ends before all of it is."""
    if not plan.schedule:
        return
    parts = [
        f"{count(entry['trained_parameters'])} from step {count(entry['step'])}" for entry in plan.schedule
    ]
    if len(parts) > 5:
        parts = [*parts[:3], "...", parts[-1]]
    yield f"parameters trained: {', '.join(parts)}"
    if plan.never_trained_parameters:
        yield (
            f"warning: the run ends before {count(plan.never_trained_parameters)} of the parameters are freed; train "
            "longer (train.epochs) or free them sooner if they are to be trained"
        )


def show_end(console: Console, prepared: Prepared, result: dict[str, Any], found: dict[str, Any]) -> None:
    """Figures with their intervals, time, memory, and where the run is."""
    console.heading("Result")
    lines = [line for name, metrics in found.items() for line in _metric_lines(name, metrics)]
    lines.append(("time", duration(result["seconds"])))
    lines.append(("peak memory", size(result["peak_memory_bytes"])))
    lines.append(("run folder", result["run"]))
    console.pairs(lines)


def show_metrics(console: Console, found: dict[str, Any]) -> None:
    """What `evaluate` found, with the table by class."""
    metrics = found["metrics"]
    lines = _metric_lines("", metrics)
    if found["truncated"]:
        lines.append(("truncated", f"{count(found['truncated'])} rows are longer than the model takes"))
    if found["skipped"]:
        lines.append(("left out", f"{count(found['skipped'])} bad rows"))
    console.pairs(lines)
    rows = [
        [label, f"{m['precision']:.3f}", f"{m['recall']:.3f}", f"{m['f1']:.3f}", str(m["rows"])]
        for label, m in metrics["per_class"].items()
    ]
    console.heading("By class")
    console.table(["class", "precision", "recall", "F1", "rows"], rows)


def _metric_lines(name: str, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = metrics["accuracy_interval"]
    worst = sorted((m["f1"], label) for label, m in metrics["per_class"].items() if m["rows"])[:3]
    accuracy = (
        f"{metrics['accuracy']:.4f} (95% interval {low:.4f} to {high:.4f}, {count(metrics['rows'])} rows)"
    )
    return [
        (f"{name} accuracy".strip(), accuracy),
        (f"{name} macro F1".strip(), f"{metrics['macro_f1']:.4f}"),
        ("hardest", ", ".join(f"{label} (F1 {f1:.2f})" for f1, label in worst)),
    ]
