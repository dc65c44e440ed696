"""The report of several runs of one task: their figures side by side, and their curves on top of each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graftkit.errors import UserError
from graftkit.report.console import count, duration, size
from graftkit.report.finished import Finished, interval_of, mapping, number
from graftkit.report.html import Child, Section, element, figure_text, page, short, table
from graftkit.report.page import PROBE, ends_of, named, told
from graftkit.report.svg import COLOURS, Line, chart, whisker

MOST = 50  # runs


def several_page(runs: Sequence[Finished]) -> str:
    """Return the report of several runs. Raises `UserError` unless they are of the same task."""
    check_alike(runs)
    names = names_of(runs)
    first = runs[0]
    sections = [Section("Figures", "figures", _figures(runs, names))]
    charts = [
        chart(
            "Training loss", [Line(n, _smooth(run.steps("loss"))) for n, run in zip(names, runs)][:COLOURS]
        ),
        chart("Evaluation loss", _lines(runs, names, "loss")),
        *[
            chart(named(name), _lines(runs, names, name))
            for name in [*first.headline[:3], PROBE]
            if name != "loss"
        ],
    ]
    if drawn := [one for one in charts if one is not None]:
        more = (
            element("p", f"The first {COLOURS} runs are drawn.", class_="quiet")
            if len(runs) > COLOURS
            else None
        )
        sections.append(Section("Training", "training", [more, element("div", drawn, class_="figures")]))
    sections.append(Section("What differs", "differences", _differences(runs, names)))
    lead: list[Child] = [
        element("p", short(first.task, 120), class_="over"), element("h1", f"{len(runs)} runs compared"),
    ]  # fmt: skip
    if notes := _notes(runs):
        items = [element("li", note) for note in notes]
        lead.append(element("aside", element("ul", items), class_="note", aria_label="Warnings"))
    foot = "Made by GraftKit from the files of " + ", ".join(str(run.folder) for run in runs)
    return page(f"{len(runs)} runs of {short(first.task_name, 40)}", lead, sections, foot)


def check_alike(runs: Sequence[Finished]) -> None:
    """Raise `UserError` if there are too many runs, or if they are of tasks whose figures cannot stand in one table."""
    if len(runs) > MOST:
        raise UserError(f"{len(runs)} runs are too many for one report; name at most {MOST}.")
    first = runs[0]
    for run in runs[1:]:
        if run.task_name != first.task_name:
            raise UserError(
                f"{first.folder} is a run of {first.task_name} and {run.folder} one of {run.task_name}; a report compares "
                "runs of one task, so make one for each task."
            )
        if run.headline[:1] != first.headline[:1]:
            raise UserError(
                f"{first.folder} is evaluated by {first.headline[0]} and {run.folder} by {run.headline[0]}; a report compares "
                "runs with the same metric, so make one for each."
            )


def names_of(runs: Sequence[Finished]) -> list[str]:
    """Return a short name for each run: its folder's, with as many of the folders above as tell it from the others."""
    parts = [run.folder.absolute().parts for run in runs]
    for depth in range(1, 1 + max(map(len, parts))):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return ["/".join(path) for path in parts]


def _notes(runs: Sequence[Finished]) -> list[str]:
    """Say what makes the figures of the runs incomparable."""
    first, notes = runs[0], []
    if any(run.split() != first.split() for run in runs):
        notes.append(
            "Some figures are of test rows and others of evaluation rows, so they cannot be compared directly."
        )
    elif len({str(run.metrics.get("rows")) for run in runs}) > 1:
        notes.append(
            f"The runs were evaluated on different numbers of {first.split()} rows, so the figures are of different rows."
        )
    elif len({str(run.data.get("test" if first.split() == "test" else "eval")) for run in runs}) > 1:
        notes.append(
            f"The {first.split()} rows come from different files, so the figures may not be comparable."
        )
    return notes


def _figures(runs: Sequence[Finished], names: Sequence[str]) -> Child:
    metrics = runs[0].headline[:4]
    values = [interval_of(run.metrics, metrics[0]) for run in runs]
    points = [v for one in values if one for v in one]
    points += [
        float(v)
        for run in runs
        if (v := number(run.metrics.get(metrics[0]))) is not None and math.isfinite(v)
    ]
    ends = ends_of(metrics[0], points) if points else (0.0, 1.0)
    heads = [
        "run",
        "method",
        named(metrics[0]),
        "95% interval",
        f"{figure_text(ends[0], 2)} to {figure_text(ends[1], 2)}",
    ]
    heads += [*map(named, metrics[1:]), "trained", "steps", "time", "peak memory"]
    rows: list[list[Child]] = []
    for place, (run, name, interval) in enumerate(zip(runs, names, values)):
        value, result = number(run.metrics.get(metrics[0])), run.result
        drawn = (
            whisker(value, *interval, ends, place, 140)
            if interval and value is not None and math.isfinite(value)
            else ""
        )
        rows.append([
            short(name, 60), short(run.recipe.get("method") or "none", 120), figure_text(value),
            f"{figure_text(interval[0])} to {figure_text(interval[1])}" if interval else "", drawn,
            *(figure_text(run.metrics.get(one)) for one in metrics[1:]),
            told(result.get("trained_parameters"), count), told(result.get("steps"), count),
            told(result.get("seconds"), duration), told(result.get("peak_memory_bytes"), size),
        ])  # fmt: skip
    return table(f"Figures on the {runs[0].split()} rows, with 95% intervals", heads, rows, words=2)


def _lines(runs: Sequence[Finished], names: Sequence[str], key: str) -> list[Line]:
    return [Line(name, run.evaluations(key), dots=True) for name, run in zip(names, runs)][:COLOURS]


def _smooth(points: list) -> list:
    """Return the running mean of a noisy line, with a weight of a twentieth for each new point."""
    made, mean = [], None
    for step, value in points:
        if number(value) is None or not math.isfinite(value):
            continue
        mean = value if mean is None else 0.95 * mean + 0.05 * value
        made.append((step, mean))
    return made


def _differences(runs: Sequence[Finished], names: Sequence[str]) -> Child:
    """Return a table of the recipe keys in which the runs differ."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "out"]
    different = [key for key in keys if len({str(one.get(key)) for one in flat}) > 1]
    if not different:
        return element("p", "Their recipes are the same, apart from the run folder.")
    rows: list[list[Child]] = [
        [short(key, 60), *(short(one[key], 80) if one.get(key) is not None else "–" for one in flat)]
        for key in different[:60]
    ]
    return table(
        "The recipe keys in which the runs differ",
        ["key", *(short(n, 40) for n in names)],
        rows,
        words=1 + len(runs),
    )


def _flat(values: dict, lead: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in mapping(values).items():
        found += (
            _flat(value, f"{lead}{key}.") if isinstance(value, dict) and value else [(f"{lead}{key}", value)]
        )
    return found
