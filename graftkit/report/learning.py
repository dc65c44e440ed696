"""What a learning curve found: a sentence, lines for the terminal, and a page."""

from __future__ import annotations

from typing import Any

from graftkit.report.comparison import gain_text, in_points, most_of
from graftkit.report.console import Console, count
from graftkit.report.html import Child, Section, element, figure_text, page, short, table
from graftkit.report.page import named
from graftkit.report.tradeoff import Curve, Dot, learning_curves

CLEAR = 0.002  # of a share, or of the value of another metric: less is no gain to speak of


def sentence(result: dict[str, Any]) -> str:
    """Say whether more rows would help."""
    metric, ahead = result["metric"], result["predicted"][0]
    unit = " points" if in_points(metric) else ""
    what = (
        f"By the curve, {count(ahead['rows'])} rows instead of {count(result['points'][-1]['rows'])} would bring {metric} from "
        f"{result['fit']['values'][-1]:.4g} to {ahead['value']:.4g}, better by {gain_text(ahead['gain'], metric)}{unit}"
    )
    ends = ahead["gain_interval"]
    if ends is None:
        return f"{what}; a single draw tells no interval."
    interval = f"95% {gain_text(ends[0], metric)} to {gain_text(ends[1], metric)}"
    least = CLEAR if in_points(metric) else CLEAR * abs(ahead["value"])
    verdict = (
        "more rows would help" if ends[0] > least
        else "more rows would hardly help" if ends[1] < 5 * least
        else "whether more rows would help is not clear"
    )  # fmt: skip
    return f"{what} ({interval}): {verdict}."


def curve_lines(console: Console, result: dict[str, Any]) -> None:
    """Print the points of a curve, what it predicts, and the sentence."""
    console.heading(f"Learning curve on {count(result['measured_rows'])} {result['split']} rows")
    console.table(["rows", result["metric"], "95% interval", ""], _rows(result))
    console.line(result["sentence"])
    for note in result["notes"]:
        console.line(f"note: {note}")
    console.line(f"the report is in {result['report']}")


def _rows(result: dict[str, Any]) -> list[list[str]]:
    measured = [[count(p["rows"]), f"{p['mean']:.4f}", _ends(p["interval"]), ""] for p in result["points"]]
    return measured + [
        [count(p["rows"]), f"{p['value']:.4f}", _ends(p["interval"]), "predicted"]
        for p in result["predicted"]
    ]


def _ends(ends: list[float] | None) -> str:
    return "" if ends is None else f"{figure_text(ends[0])} to {figure_text(ends[1])}"


def _dot(rows: float, value: float, ends: list[float] | None) -> Dot:
    return Dot(rows, value, None if ends is None else (ends[0], ends[1]))


def curve_page(result: dict[str, Any]) -> str:
    """Return the report of a learning curve."""
    metric, fit = result["metric"], result["fit"]
    measured = [_dot(p["rows"], p["mean"], p["interval"]) for p in result["points"]]
    last = _dot(result["points"][-1]["rows"], fit["values"][-1], result["points"][-1]["interval"])
    ahead = [last, *(_dot(p["rows"], p["value"], p["interval"]) for p in result["predicted"])]
    drawn = learning_curves(
        named(metric),
        [Curve("measured", measured, 0), Curve("power law, extrapolated", ahead, 1, True)],
        "training rows",
        most_of(metric),
    )
    lead: list[Child] = [
        element(
            "p", f"{short(result['model'], 100)}, {short(result['task'], 100)}", class_="over", dir="auto"
        ),
        element("h1", "Would more rows help?", element("small", result["sentence"])),
    ]
    if result["notes"]:
        items = element("ul", [element("li", short(note, 400)) for note in result["notes"]])
        lead.append(element("aside", items, class_="note", aria_label="Worth knowing"))
    law = (
        f"{fit['formula']}, with a floor of {fit['floor']:.4g}, a factor of {fit['factor']:.4g} and an exponent of "
        f"{fit['exponent']:.3g}. The intervals are of laws fitted to resamples of rows and seeds; they do not cover that a curve "
        "may bend otherwise beyond its last point."
    )
    caption = (
        f"On {count(result['measured_rows'])} {result['split']} rows, {result['seeds']} draws each, after "
        f"{count(result['steps'])} steps whatever the number of rows"
    )
    cells: list[list[Child]] = [[*row] for row in _rows(result)]
    sections = [
        Section("Learning curve", "curve", element("div", drawn, class_="figures")),
        Section("Figures", "figures", table(caption, ["rows", named(metric), "95% interval", ""], cells)),
        Section("Power law", "fit", element("p", law)),
    ]
    foot = f"Made by GraftKit from the runs in {result['curve']}, of {short(result['method'], 200)}"
    return page("Learning curve", lead, sections, foot)
