"""What a comparison of methods found: lines for the terminal, and a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from graftkit.report.console import Console, count, duration, size
from graftkit.report.html import Child, Section, element, figure_text, page, short, table
from graftkit.report.page import RATIOS, ends_of, named
from graftkit.report.svg import whisker
from graftkit.report.tradeoff import Curve, Dot, learning_curves, trade_off

EQUAL = 1.02  # costs that differ by less are the same
COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("seconds", "time", duration),
    ("peak_memory_bytes", "peak memory", size),
    ("trained_parameters", "trained parameters", lambda value: _short_count(value)),
)


def _short_count(value: float) -> str:
    for least, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= least:
            return f"{value / least:.3g}{letter}"
    return f"{value:.3g}"


def in_points(metric: str) -> bool:
    """Return whether a metric is a share, whose differences are told in points of a hundred."""
    return any(part in metric for part in RATIOS)


def gain_text(value: float, metric: str, signed: bool = False) -> str:
    """Format a difference of a metric: 0.8 points, or 0.0213."""
    if in_points(metric):
        return f"{round(100 * value, 1) + 0.0:{'+' if signed else ''}.1f}"
    return f"{value:{'+' if signed else ''}.4g}"


def difference_text(difference: dict[str, Any], metric: str) -> str:
    """Say how much better a method is than another, and whether that is clear."""
    unit = " points" if in_points(metric) else f" in {metric}"
    by, ends = difference["by"], difference["interval"]
    one, other = short(difference["method"], 80), short(difference["than"], 80)
    if ends is None:
        return (
            f"{one} is better than {other} by {gain_text(by, metric)}{unit}; a single run tells no interval."
        )
    interval = f"95% {gain_text(ends[0], metric)} to {gain_text(ends[1], metric)}"
    if ends[0] > 0:
        return f"{one} is better than {other} by {gain_text(by, metric)}{unit}, {interval}."
    return f"{one} and {other} do not differ clearly: {gain_text(by, metric, signed=True)}{unit}, {interval}."


def ranks(result: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return the rows of methods that were trained, for each number of rows per class, the fewest first."""
    rows = [row for row in result["rows"] if "refused" not in row]
    sizes = dict.fromkeys(row.get("few") for row in rows)
    return [[row for row in rows if row.get("few") == few] for few in sizes]


def lines_of(console: Console, result: dict[str, Any]) -> None:
    """Print the tables of a comparison, the differences, and what to know of them."""
    metric = result["metric"]
    for rows in ranks(result):
        few = rows[0].get("few")
        what = f"Comparison on {count(result['measured_rows'])} {result['split']} rows"
        console.heading(what + ("" if few is None else f", {few} training rows per class"))
        console.table(
            ["method", metric, "95% interval", "learning rate", "time", "peak memory", "trained", "graft"],
            [
                [row["method"], f"{row['mean']:.4f}", _interval(row["interval"]), f"{row['learning_rate']:.3g}",
                 duration(row["seconds"]), size(row["peak_memory_bytes"]), count(row["trained_parameters"]),
                 size(row["graft_bytes"])] for row in rows
            ],
        )  # fmt: skip
        for row in rows:
            if "next" in row:
                console.line(difference_text(row["next"], metric))
    for row in result["rows"]:
        if "refused" in row:
            console.line(f"{_at(row)} was refused: {row['refused']}")
    if result["pareto"]:
        console.line(f"best for their cost: {', '.join(result['pareto'])}")
    for note in result["notes"]:
        console.line(f"note: {note}")
    console.line(f"the report is in {result['report']}")


def _at(row: dict[str, Any]) -> str:
    return row["method"] + (f" with {row['few']} rows per class" if row.get("few") is not None else "")


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{figure_text(ends[0])} to {figure_text(ends[1])}"


def comparison_page(result: dict[str, Any]) -> str:
    """Return the report of a comparison."""
    groups = ranks(result)
    metric = result["metric"]
    lead: list[Child] = [
        element("p", f"{short(result['model'], 100)}, {short(result['task'], 100)}", class_="over", dir="auto"),
        element("h1", f"{len(groups[-1]) if groups else 0} methods compared", element("small", _headline(result, groups))),
    ]  # fmt: skip
    notes = [
        *result["notes"],
        *(f"{_at(row)}: {text}" for rows in groups for row in rows for text in row["failed"]),
    ]
    if notes:
        items = element("ul", [element("li", short(note, 400), dir="auto") for note in notes])
        lead.append(element("aside", items, class_="note", aria_label="Worth knowing"))
    sections = []
    for rows in reversed(groups):
        few = rows[0].get("few")
        name, where = ("figures", "") if few is None else (f"figures-{few}", f", {few} rows per class")
        sections.append(Section(f"Figures{where}", name, _figures(result, rows)))
        if rows is groups[-1]:
            if drawn := _trade_offs(result, rows):
                sections.append(Section("Quality and cost", "cost", drawn))
            if len(groups) > 1:
                sections.append(Section("Rows and quality", "rows", _curves(metric, groups)))
    if groups and len(groups[-1]) > 1:
        sections.append(Section("Differences", "differences", _differences(result)))
    if groups:
        sections.append(Section("Learning rates tried", "rates", _rates(metric, groups)))
    if refused := [row for row in result["rows"] if "refused" in row]:
        cells: list[list[Child]] = [[_at(row), short(row["refused"], 400)] for row in refused]
        caption = "Methods that this task or model does not take"
        sections.append(
            Section("Refused", "refused", table(caption, ["method", "why"], cells, words=2, class_="told"))
        )
    return page("Methods compared", lead, sections, f"Made by GraftKit from the runs in {result['compare']}")


def _headline(result: dict[str, Any], groups: list[list[dict[str, Any]]]) -> str:
    if not groups or "next" not in groups[-1][0]:
        return ""
    return difference_text(groups[-1][0]["next"], result["metric"])


def _figures(result: dict[str, Any], rows: list[dict[str, Any]]) -> Child:
    metric = result["metric"]
    values = [v for row in rows for v in (row["mean"], *(row["interval"] or ()))]
    ends = ends_of(metric, values)
    if in_points(metric) and max(values) <= 1 and min(values) >= 0:  # methods are close to each other
        room = 0.1 * (max(values) - min(values)) or 0.05
        ends = max(0.0, min(values) - room), min(1.0, max(values) + room)
    heads = [
        "method", f"mean {named(metric).lower()}", "95% interval", f"{figure_text(ends[0], 2)} to {figure_text(ends[1], 2)}",
        "seeds", "learning rate", "time", "peak memory", "trained", "graft",
    ]  # fmt: skip
    best = result["pareto"] if rows == ranks(result)[-1] else []  # the front is that of the most rows
    cells: list[list[Child]] = [
        [
            [f"{place + 1}. {short(row['method'], 120)}", [" ", element("small", "best for its cost", class_="quiet")]
             if row["method"] in best else None],
            figure_text(row["mean"]), _interval(row["interval"]),
            whisker(row["mean"], row["interval"][0], row["interval"][1], ends, place, 140) if row["interval"] else "",
            row["seeds"], f"{row['learning_rate']:.3g}", duration(row["seconds"]), size(row["peak_memory_bytes"]),
            count(row["trained_parameters"]), size(row["graft_bytes"]),
        ] for place, row in enumerate(rows)
    ]  # fmt: skip
    caption = (
        f"On {count(result['measured_rows'])} {result['split']} rows, after {count(result['steps'])} steps each. Time and peak "
        f"memory are medians over the seeds{_pace(result)}"
    )
    told = [element("li", difference_text(row["next"], metric), dir="auto") for row in rows if "next" in row]
    return [table(caption, heads, cells), element("ul", told) if told else None]


def _pace(result: dict[str, Any]) -> str:
    """Say that runs shared the machine, if they did: each took longer than it would alone."""
    if result.get("at_once", 1) < 2:
        return ""
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    return f"; {result['at_once']} runs trained at a time, with {threads} each"


def _trade_offs(result: dict[str, Any], rows: list[dict[str, Any]]) -> Child:
    """Return the charts of quality against each cost, or None if there is one method."""
    if len(rows) < 2:
        return None
    up, metric = result["direction"] != "min", result["metric"]
    charts = []
    for key, name, form in COSTS:
        dots = [Dot(row[key], row["mean"], row["interval"]) for row in rows]
        front = [
            i for i, row in enumerate(rows)
            if not any(_beats(other, row, key, up) for other in rows)
        ]  # fmt: skip
        charts.append(
            trade_off(
                f"{named(metric)} and {name}",
                dots,
                front,
                [row["method"] for row in rows],
                form,
                up,
                most_of(metric),
            )
        )
    drawn = [one for one in charts if one is not None]
    text = "The numbers are those of the table above; costs are on a logarithmic axis."
    return [element("p", text, class_="quiet"), element("div", drawn, class_="figures")] if drawn else None


def _beats(one: dict[str, Any], other: dict[str, Any], cost: str, up: bool) -> bool:
    """Return whether a method is as good as another for as little, and better in one of these."""
    gain = (one["mean"] - other["mean"]) * (1 if up else -1)
    if gain < 0 or one[cost] > EQUAL * other[cost]:
        return False
    return gain > 0 or EQUAL * one[cost] < other[cost]


def most_of(metric: str) -> float:
    """Return the largest value that a metric can have."""
    return 1.0 if in_points(metric) else math.inf


def _curves(metric: str, groups: list[list[dict[str, Any]]]) -> Child:
    methods = [row["method"] for row in groups[-1]]
    curves = [
        Curve(method, [Dot(row["few"], row["mean"], row["interval"]) for rows in groups for row in rows
                       if row["method"] == method], place)
        for place, method in enumerate(methods)
    ]  # fmt: skip
    made = learning_curves(named(metric), curves[:8], "training rows per class", most_of(metric))
    return element("div", made, class_="figures")


def _differences(result: dict[str, Any]) -> Child:
    metric = result["metric"]
    unit = ", in points" if in_points(metric) else ""
    cells: list[list[Child]] = [
        [
            short(one["method"], 80), short(one["than"], 80), gain_text(one["by"], metric, signed=True),
            "" if one["interval"] is None else " to ".join(gain_text(end, metric, signed=True) for end in one["interval"]),
            "yes" if one["interval"] is not None and one["interval"][0] > 0 else "no",
        ] for one in result["differences"][:200]
    ]  # fmt: skip
    caption = f"How much better the first is than the second on the same rows{unit}; clear: the interval is above zero"
    return table(caption, ["method", "than", "better by", "95% interval", "clear"], cells, words=2)


def _rates(metric: str, groups: list[list[dict[str, Any]]]) -> Child:
    cells: list[list[Child]] = [
        [
            _at(row),
            ", ".join(f"{one['learning_rate']:.3g}: {'failed' if one['value'] is None else figure_text(one['value'])}"
                      for one in row["tried"]),
        ] for rows in groups for row in rows
    ]  # fmt: skip
    caption = f"{named(metric)} on the evaluation rows by learning rate, with the first seed"
    return table(caption, ["method", "learning rate: value"], cells, words=2)
