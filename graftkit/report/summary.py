"""What a run found, will cost, and gave, for the terminal. No torch here: it reads plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graftkit.report.console import Console, count, duration, size
from graftkit.report.values import Found, Sizes

HARDEST = 3  # classes, and examples that went most wrong, that are shown


def title(name: str) -> str:
    """How the name of a figure is written for people."""
    return {"macro_f1": "macro F1", "f1": "F1", "exact_match": "exact match"}.get(
        name, name.replace("_", " ")
    )


def show_found(console: Console, found: Found) -> None:
    """Backbone, sites, rows and labels, before the first step."""
    width = "" if found.width is None else f", width {found.width}"
    parts = [f"{number:,} {name}" for name, number in found.rows.items()]
    columns = ", ".join(f"{name} = {column!r}" for name, column in found.columns.items())
    lines = [
        ("backbone", f"{found.model} ({found.model_class}, {found.blocks} blocks{width})"),
        ("sites", ", ".join(f"{number} {role}" for role, number in found.sites.items())),
        ("rows", f"{', '.join(parts)}; columns {columns}"),
    ]
    train = found.statistics
    console.heading("Found")
    if found.labels:
        text = f"{len(found.labels)}: {', '.join(found.labels[:4])}{' ...' if len(found.labels) > 4 else ''}"
        lines.append(("labels", text + _spread(train.get("labels"), train.get("counted", "training rows"))))
    lines += [("warning", text) for text in found.warnings]
    if found.skipped:
        lines.append(("left out", f"{len(found.skipped)} bad rows, the first: {found.skipped[0]}"))
    lines.append(("sizes", _sizes(found.sizes)))
    if also := ", ".join(_also(train)):
        lines.append(("also", also))
    lines += [("note", text) for text in train.get("notes", ())]
    if found.chosen_by is not None and found.chosen_by < FEW:
        few = f"{found.chosen_by} rows are few to choose the best weights by"
        lines.append(("note", f"{few}; data.eval=null keeps the last ones instead"))
    console.pairs(lines)


FEW = 50  # evaluation rows; with as many, the 95% interval of an accuracy of 0.9 is 17 points wide
TOLD = {"rows", "lengths", "truncated", "labels", "counted", "notes", "example"}  # in words of their own


def statistics_lines(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a task says of one part of the data, in words."""
    lengths = part["lengths"]
    unit = lengths["unit"]
    text = f"{count(lengths['sum'])} {unit}"
    if lengths["longest"] > 1:  # else a row is one image
        text += f", {lengths['mean']:.1f} a row, longest {count(lengths['longest'])}"
    lines = [("rows", count(part["rows"])), ("sizes", text)]
    if part["truncated"]:
        lines.append(("truncated", f"{count(part['truncated'])} row{'s' * (part['truncated'] != 1)}"))
    if part.get("labels"):
        spread = _spread(part["labels"], part.get("counted", "rows")).removeprefix("; ")
        lines.append(("labels", f"{len(part['labels'])}: {spread}"))
    if also := ", ".join(_also(part)):
        lines.append(("also", also))
    return lines + [("note", text) for text in part.get("notes", ())]


def _also(part: Mapping[str, Any]) -> Iterator[str]:
    """Figures that only some tasks have; zeros and what is nested deeper are left to the JSON."""
    for name, value in part.items():
        if name in TOLD:
            continue
        if isinstance(value, dict):
            inner = {
                key: one
                for key, one in value.items()
                if isinstance(one, float) or (isinstance(one, int) and one)
            }
            if inner:
                counts = "unit" not in value and all(isinstance(one, int) for one in inner.values())
                figures = " ".join(
                    f"{key} ({count(one)})" if counts else f"{key} {_figure(one)}"
                    for key, one in inner.items()
                )
                yield (
                    f"{title(name)} ({value['unit']}) {figures}"
                    if "unit" in value
                    else f"{title(name)}: {figures}"
                )
        elif isinstance(value, str) or (isinstance(value, int | float) and value):
            yield f"{title(name)} {value if isinstance(value, str) else _figure(value)}"


def _figure(value: float) -> str:
    return count(value) if isinstance(value, int) else f"{value:,.4g}"


def _spread(counts: dict[str, int] | None, what: str) -> str:
    """How many rows, or what else a task counts, the rarest and the commonest label have."""
    if not counts:
        return ""
    (rare, fewest), (common, most) = (pick(counts.items(), key=lambda item: item[1]) for pick in (min, max))
    if fewest == most:
        return f"; {count(most)}{f' {what}' if most != 1 else ''} each"
    return f"; {count(fewest)} ({rare}) to {count(most)} ({common}) {what} each"


def _sizes(sizes: Sizes) -> str:
    """How long rows are, how much of the batches is padding, and how many rows were cut."""
    if sizes.padding is None:
        text = f"{count(sizes.rows)} rows of one size"
    else:
        text = (
            f"{sizes.total:,} {sizes.unit}, {sizes.mean:.1f} a row, longest {sizes.longest:,}, "
            f"{sizes.padding:.1%} padding"
        )
    if sizes.truncated:
        text += (
            f"; {sizes.truncated:,} of {sizes.truncated_of:,} rows are longer than {sizes.max_length:,} {sizes.unit} "
            "and were truncated"
        )
    return text


def show_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """Exact counts before the first step. `plan`: what plan.json holds."""
    trained, total = plan["trained_parameters"], plan["total_parameters"]
    groups = ", ".join(f"{name} {count(number)}" for name, number in plan["groups"].items())
    console.heading("Plan")
    console.pairs(
        [
            ("method", plan["method"] or "none: the model as it is"),
            ("trained", f"{count(trained)} of {count(total)} parameters ({trained / total:.2%}){': ' if groups else ''}{groups}"),
            *(("schedule", text) for text in _schedule(plan)),
            *(("warning", text) for text in plan["warnings"]),
            ("frozen", _frozen(plan["frozen_blocks"], plan["blocks"])),
            ("memory", f"weights {size(plan['weight_bytes'])}, gradients {size(plan['gradient_bytes'])}, "
                       f"optimizer {size(plan['optimizer_bytes'])}; activations come on top"),
            ("steps", f"{count(plan['steps'])} of {plan['batch_size']} rows ({count(plan['steps_per_epoch'])} an epoch)"
                      f"{' with ' + plan['optimizer'] if plan['steps'] else ''}, {plan['precision']}"),
        ]
    )  # fmt: skip


def _frozen(frozen: int, blocks: int) -> str:
    if not frozen:
        return f"none: gradients go through all {blocks} blocks"
    return f"the first {frozen} of {blocks} blocks are computed without gradients"


def show_rendered(console: Console, text: str) -> None:
    """A row as the model reads it, where its task has one to show."""
    if text:
        console.heading("A row as the model reads it")
        for line in text.splitlines():
            console.line(f"  {line}")


def _schedule(plan: Mapping[str, Any]) -> Iterator[str]:
    """What is trained from which step on, and whether the run ends before all of it is."""
    if not plan["schedule"]:
        return
    parts = [
        f"{count(entry['trained_parameters'])} from step {count(entry['step'])}" for entry in plan["schedule"]
    ]
    if len(parts) > 5:
        parts = [*parts[:3], "...", parts[-1]]
    yield f"parameters trained: {', '.join(parts)}"
    if plan["never_trained_parameters"]:
        yield (
            f"warning: the run ends before {count(plan['never_trained_parameters'])} of the parameters are freed; train "
            "longer (train.epochs) or free them sooner if they are to be trained"
        )


def show_end(
    console: Console, headline: Sequence[str], result: dict[str, Any], found: dict[str, Any],
    worst: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Figures with their intervals, what went most wrong, time, memory, and where the run is."""
    console.heading("Result")
    lines = [line for name, metrics in found.items() for line in _metric_lines(name, metrics, headline)]
    lines.append(("time", duration(result["seconds"])))
    lines.append(("peak memory", size(result["peak_memory_bytes"])))
    lines.append(("run folder", result["run"]))
    console.pairs(lines)
    show_worst(console, worst)


def show_worst(console: Console, worst: list[dict[str, Any]]) -> None:
    """The examples that the model got most wrong."""
    if worst:
        console.heading("Most wrong")
        for row in worst[:HARDEST]:
            where, asked, expected, answer = mistake(row)
            console.line(f"  {asked}" if where == asked else f"  {where.rpartition('/')[2]}: {asked}")
            console.line(f"    expected {expected}, answered {answer}")


def mistake(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Where an example stands, what was asked, what should have come, and what came."""
    aside = ("where", "id", "expected", "answer", "loss")
    asked = [_said(value) for key, value in row.items() if key not in aside and not isinstance(value, float)]
    return (
        row["where"],
        _short(" | ".join(filter(None, asked)), 120),
        _short(_said(row["expected"])),
        _short(_said(row["answer"])),
    )


def _said(value: Any) -> str:
    """A value of an example for people."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value)) or "nothing"
    if isinstance(value, dict):
        return " ".join(_said(one) for one in value.values())
    return "nothing" if value is None or value == "" else str(value)


def _short(text: str, most: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def show_metrics(console: Console, found: dict[str, Any], headline: Sequence[str]) -> None:
    """What `evaluate` found, with the table by class where there is one."""
    metrics = found["metrics"]
    lines = _metric_lines("", metrics, headline)
    if found["truncated"]:
        lines.append(("truncated", f"{count(found['truncated'])} rows are longer than the model takes"))
    if found["skipped"]:
        lines.append(("left out", f"{count(found['skipped'])} bad rows"))
    console.pairs(lines)
    rows = [
        [label, f"{m['precision']:.3f}", f"{m['recall']:.3f}", f"{m['f1']:.3f}", str(m["rows"])]
        for label, m in metrics.get("per_class", {}).items()
    ]
    if rows:
        console.heading("By class")
        console.table(["class", "precision", "recall", "F1", "support"], rows)
    show_worst(console, found.get("worst", []))


def _metric_lines(name: str, metrics: dict[str, Any], headline: Sequence[str]) -> list[tuple[str, str]]:
    lines = []
    shown = [figure for figure in headline if figure in metrics]
    for figure in shown:
        text = f"{metrics[figure]:.4f}"
        interval = metrics.get(f"{figure}_interval")
        if interval and figure == shown[0]:
            text += f" (95% interval {interval[0]:.4f} to {interval[1]:.4f}, {count(metrics['rows'])} rows)"
        lines.append((f"{name} {title(figure)}".strip(), text))
    by_class = metrics.get("per_class", {})
    worst = sorted((m["f1"], label) for label, m in by_class.items() if m["rows"] and m["f1"] < 1)[:HARDEST]
    if worst:
        lines.append(("hardest", ", ".join(f"{label} (F1 {f1:.2f})" for f1, label in worst)))
    return lines
