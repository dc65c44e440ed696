"""Charts of comparisons: quality against cost, and learning curves with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graftkit.report.html import Child, Markup, element, short
from graftkit.report.svg import (
    BOTTOM,
    COLOURS,
    DASHES,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    drawing,
    tick_text,
    ticks,
)


@dataclass(frozen=True)
class Dot:
    """A value at a place on the horizontal axis, with its interval if it has one."""

    x: float
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """Dots that are joined, with a band between their intervals. `dashed`: an extrapolation, in the colour of `colour`."""

    name: str
    dots: Sequence[Dot]
    colour: int
    dashed: bool = False


def trade_off(
    title: str, dots: Sequence[Dot], front: Sequence[int], names: Sequence[str], form: Callable[[float], str], up: bool,
    most: float = math.inf,
) -> Markup | None:  # fmt: skip
    """Return a figure of values against a cost on a logarithmic axis, with the number of each dot beside it; a line joins
    `front`, the places of those that nothing beats here. None if a cost is not positive. `up`: larger values are better;
    `most`: the largest value that there can be."""
    if not dots or any(dot.x <= 0 for dot in dots):
        return None
    across, axis = _axes(dots)
    made: list[Child] = [*_grid(across, axis, form, most)]
    steps = sorted((dots[place] for place in front), key=lambda dot: dot.x)
    joined = len({dot.x for dot in steps}) > 1
    if joined:
        made.append(
            element("path", d=_path([(across(math.log(d.x)), axis(d.value)) for d in steps]), class_="even")
        )
    for place, dot in enumerate(dots):
        x, y, colour = round(across(math.log(dot.x)), 1), round(axis(dot.value), 1), f"c{place % COLOURS}"
        if dot.interval is not None:
            low, high = (round(axis(end), 1) for end in dot.interval)
            made.append(
                element("line", x1=x, x2=x, y1=low, y2=high, class_=f"whisker {colour}", stroke_opacity=0.45)
            )
        what = f"{names[place]}: {dot.value:.4g} at {form(dot.x)}"
        made.append(element("circle", element("title", what), cx=x, cy=y, r=4.5, class_=f"dot {colour}"))
        left = x > WIDTH - 40
        made.append(
            element(
                "text", place + 1, x=x - 8 if left else x + 8, y=y - 5, text_anchor="end" if left else "start"
            )
        )
    told = "; ".join(f"{short(name, 60)}: {dot.value:.4g} at {form(dot.x)}" for name, dot in zip(names, dots))
    note = f" dashed: nothing is {'better' if up else 'lower'} for less"
    caption = element("figcaption", title, element("small", note if joined else None))
    return element("figure", caption, drawing(WIDTH, HEIGHT, f"{title}: {told}", *made))


def learning_curves(title: str, curves: Sequence[Curve], x: str, most: float = math.inf) -> Markup | None:
    """Return a figure of curves over numbers of rows on a logarithmic axis; None if there is no dot. `most`: the largest value
    that there can be."""
    dots = [dot for curve in curves for dot in curve.dots]
    if not dots:
        return None
    across, axis = _axes(dots)
    made: list[Child] = [*_grid(across, axis, lambda value: tick_text(float(f"{value:.3g}")), most, x)]
    for curve in curves:
        colour = f"c{curve.colour % COLOURS}"
        places = [(across(math.log(dot.x)), axis(dot.value)) for dot in curve.dots]
        ends = [
            (across(math.log(d.x)), axis(d.interval[0]), axis(d.interval[1]))
            for d in curve.dots
            if d.interval
        ]
        if len(ends) > 1:
            outline = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
            made.append(element("path", d=_path(outline) + "Z", class_=f"band {colour}"))
        dash = "4 4" if curve.dashed else DASHES[curve.colour % len(DASHES)]
        made.append(element("path", d=_path(places), class_=f"line {colour}", stroke_dasharray=dash))
        for (px, py), dot in zip(places, curve.dots):
            what = f"{curve.name}: {dot.value:.4g} at {dot.x:,.0f}"
            made.append(
                element(
                    "circle",
                    element("title", what),
                    cx=round(px, 1),
                    cy=round(py, 1),
                    r=3,
                    class_=f"dot {colour}",
                )
            )
    told = "; ".join(
        f"{short(curve.name, 60)}: " + ", ".join(f"{dot.value:.4g} at {dot.x:,.0f}" for dot in curve.dots)
        for curve in curves
    )
    keys = [element("li", _key(curve), short(curve.name, 60), dir="auto") for curve in curves]
    return element(
        "figure", element("figcaption", title, element("small", " bands: 95% intervals")),
        element("ul", keys, class_="keys") if len(curves) > 1 else None,
        drawing(WIDTH, HEIGHT, f"{title}: {told}", *made),
    )  # fmt: skip


def _key(curve: Curve) -> Markup:
    dash = "4 4" if curve.dashed else DASHES[curve.colour % len(DASHES)]
    line = element("path", d="M1 4H21", class_=f"line c{curve.colour % COLOURS}", stroke_dasharray=dash)
    return element("svg", line, viewBox="0 0 22 8", aria_hidden="true")


def _axes(dots: Sequence[Dot]) -> tuple[Axis, Axis]:
    """Return the axes that hold the logarithms of the places, and the values with their intervals."""
    places = [math.log(dot.x) for dot in dots]
    values = [v for dot in dots for v in (dot.value, *(dot.interval or ()))]
    room = 0.08 * (max(places) - min(places)) or 0.5
    space = 0.08 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 0.5
    across = Axis(min(places) - room, max(places) + room, LEFT, WIDTH - RIGHT)
    return across, Axis(min(values) - space, max(values) + space, HEIGHT - BOTTOM, TOP)


def _grid(across: Axis, up: Axis, form: Callable[[float], str], most: float, x: str = "") -> list[Markup]:
    """Return the axes with their numbers; `across` is of logarithms."""
    base = HEIGHT - BOTTOM
    made = [element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis")]
    for value in ticks(up.low, up.high):
        if value > most + 1e-9:
            continue
        y = round(up(value), 1)
        made.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        made.append(element("text", tick_text(value), x=LEFT - 6, y=round(y + 3.7, 1), text_anchor="end"))
    free, before = 0.0, ""  # where there is room for the next number, and the last one
    for value in log_ticks(math.exp(across.low), math.exp(across.high)):
        place = round(across(math.log(value)), 1)
        half = 3 * len(form(value))
        if place - half < free or form(value) == before:  # seconds, of which fractions are not shown
            continue
        free, before = place + half + 8, form(value)
        made.append(element("line", x1=place, x2=place, y1=base, y2=base + 4, class_="axis"))
        anchor = "end" if place + half > WIDTH else "middle"
        made.append(element("text", form(value), x=place, y=base + 16, text_anchor=anchor))
    if x:
        made.append(element("text", x, x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end"))
    return made


def log_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Return round numbers between two positive ones for a logarithmic axis, at most `most`: powers of ten times 1, or times
    more digits where these are too few; evenly spaced ones if there are no two of these, or a single one in the middle."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for times in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [t * 10.0**d for d in decades for t in times if low <= t * 10.0**d <= high]
        if len(found) <= most:
            break
    if len(found) > most:
        found = found[:: math.ceil(len(found) / most)]
    if len(found) < 2:
        found = ticks(low, high, most)
    return found if len(found) > 1 else [float(f"{math.sqrt(low * high):.3g}")]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
