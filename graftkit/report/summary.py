"""Print what a run found, its plan and its result. No torch here: everything is plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graftkit.report.console import Console, count, duration, rows_of, size
from graftkit.report.values import Found, Sizes

HARDEST = 3  # classes and examples to show


def title(name: str) -> str:
    """Return the display name of a metric."""
    return {"macro_f1": "macro F1", "f1": "F1", "exact_match": "exact match"}.get(
        name, name.replace("_", " ")
    )


def show_found(console: Console, found: Found) -> None:
    """Print backbone, sites, rows and labels, before the first step."""
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
        lines.append(("skipped", f"{len(found.skipped)} bad rows, the first: {found.skipped[0]}"))
    lines.append(("sizes", _sizes(found.sizes)))
    if also := ", ".join(_also(train)):
        lines.append(("also", also))
    lines += [("note", text) for text in train.get("notes", ())]
    if found.chosen_by is not None and found.chosen_by < FEW:
        few = f"{found.chosen_by} rows are too few to select the best weights reliably"
        lines.append(("note", f"{few}; data.eval=null keeps the last ones instead"))
    console.pairs(lines)


FEW = 50  # evaluation rows; with this many, the 95% interval of an accuracy of 0.9 is 17 points wide
TOLD = {
    "rows",
    "lengths",
    "truncated",
    "labels",
    "counted",
    "notes",
    "example",
}  # printed on lines of their own


def statistics_lines(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Format the statistics of one data split."""
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
    """Yield the statistics that only some tasks have; zeros and deeper nesting are left to the JSON."""
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
    """Format the counts of the rarest and the most common label."""
    if not counts:
        return ""
    (rare, fewest), (common, most) = (pick(counts.items(), key=lambda item: item[1]) for pick in (min, max))
    if fewest == most:
        return f"; {count(most)}{f' {what}' if most != 1 else ''} each"
    return f"; {count(fewest)} ({rare}) to {count(most)} ({common}) {what} each"


def _sizes(sizes: Sizes) -> str:
    """Format row lengths, the fraction of padding, and the number of truncated rows."""
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
    """Print exact counts before the first step. `plan`: the content of plan.json."""
    trained, total = plan["trained_parameters"], plan["total_parameters"]
    groups = ", ".join(f"{name} {count(number)}" for name, number in plan["groups"].items())
    console.heading("Plan")
    console.pairs(
        [
            ("method", plan["method"] or "none: the model is unchanged"),
            ("trained", f"{count(trained)} of {count(total)} parameters ({trained / total:.2%}){': ' if groups else ''}{groups}"),
            *(("schedule", text) for text in _schedule(plan)),
            *(("warning", text) for text in plan["warnings"]),
            *([("learning rate", "found by a range test before the first step")] if plan.get("lr") == "find" else []),
            ("frozen", _frozen(plan["frozen_blocks"], plan["blocks"])),
            ("memory", f"weights {size(plan['weight_bytes'])}, gradients {size(plan['gradient_bytes'])}, "
                       f"optimizer {size(plan['optimizer_bytes'])}"
                       f"{', average ' + size(plan['ema_bytes']) if plan['ema_bytes'] else ''}; activations come on top"),
            ("steps", f"{count(plan['steps'])} of {rows_of(plan['batch_size'], plan.get('batch_tokens'))} ({count(plan['steps_per_epoch'])} an epoch)"
                      f"{' with ' + plan['optimizer'] if plan['steps'] else ''}, {plan['precision']}"),
        ]
    )  # fmt: skip


def _frozen(frozen: int, blocks: int) -> str:
    if not frozen:
        return f"none: gradients go through all {blocks} blocks"
    return f"the first {frozen} of {blocks} blocks are computed without gradients"


def show_rendered(console: Console, text: str) -> None:
    """Print a row as the model reads it, if its task can show one."""
    if text:
        console.heading("A row as the model reads it")
        for line in text.splitlines():
            console.line(f"  {line}")


def _schedule(plan: Mapping[str, Any]) -> Iterator[str]:
    """Yield how many parameters are trained from which step on, and whether the run ends too early."""
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
    """Print the metrics with intervals, the worst examples, time, memory and the run folder."""
    console.heading("Result")
    lines = [line for name, metrics in found.items() for line in _metric_lines(name, metrics, headline)]
    lines += [*confidence_lines(result.get("confidence")), *noticed_lines(result.get("noticed"))]
    lines.append(("time", duration(result["seconds"])))
    lines.append(("peak memory", size(result["peak_memory_bytes"])))
    lines.append(("run folder", result["run"]))
    console.pairs(lines)
    show_worst(console, worst)


def noticed_lines(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Format how many labels of evaluation and test rows the model is sure are others."""
    names = {"eval": "evaluation"}
    return [
        ("labels to check", f"{count(one['count'])} of {count(one['judged'])} {names.get(one['data'], one['data'])} {one['of']}; "
         "report.html shows them")
        for one in (found or {}).get("suspects", ()) if one["count"]
    ]  # fmt: skip


def show_worst(console: Console, worst: list[dict[str, Any]]) -> None:
    """Print the worst examples."""
    if worst:
        console.heading("Worst examples")
        for row in worst[:HARDEST]:
            where, asked, expected, answer = mistake(row)
            console.line(f"  {asked}" if where == asked else f"  {where.rpartition('/')[2]}: {asked}")
            console.line(f"    expected {expected}, answered {answer}")


def mistake(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return where an example is, its input, the expected answer and the answer."""
    aside = ("where", "id", "expected", "answer", "marks", "loss")
    asked = [said(value) for key, value in row.items() if key not in aside and not isinstance(value, float)]
    return (
        row["where"],
        _short(" | ".join(filter(None, asked)), 120),
        _short(said(row["expected"])),
        _short(said(row["answer"])),
    )


def said(value: Any) -> str:
    """Format a value of an example for display."""
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value)) or "nothing"
    if isinstance(value, dict):
        return " ".join(said(one) for one in value.values())
    return "nothing" if value is None or value == "" else str(value)


def _short(text: str, most: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def confidence_lines(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Format what was fitted on evaluation rows: the content of `confidence` in result.json, or of `evaluate`."""
    if not found:
        return []
    rows = f", fitted on {count(found['rows'])} evaluation rows" if "rows" in found else ""
    lines = [("temperature", f"{found['temperature']:.3g}{rows}")]
    for name, figures in (("", found), ("test ", found.get("test", {}))):
        if "before" in figures:
            text = f"{figures['before']:.4f}; {figures['after']:.4f} with the temperature"
            lines.append((f"{name}calibration error", text))
    return lines + ([("note", found["note"])] if "note" in found else [])


def show_metrics(console: Console, found: dict[str, Any], headline: Sequence[str]) -> None:
    """Print the result of `evaluate`, with the table by class if there is one."""
    metrics = found["metrics"]
    lines = [*_metric_lines("", metrics, headline), *confidence_lines(found.get("confidence"))]
    if found["truncated"]:
        lines.append(("truncated", f"{count(found['truncated'])} rows are longer than the model's limit"))
    if found["skipped"]:
        lines.append(("skipped", f"{count(found['skipped'])} bad rows"))
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
