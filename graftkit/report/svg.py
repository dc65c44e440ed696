"""Small charts as SVG: lines over steps, intervals, and the calibration of probabilities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftkit.report.html import Child, Markup, element, short

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 34
MOST = 240  # points of a line; more are averaged
COLOURS = 8
LARGEST = 1e200  # of a number that is drawn
DASHES = (None, "6 3", "2 3", "8 3 2 3")  # beside the colour, so that lines can be told apart without it
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart. `noisy`: it is drawn pale, with its moving average on top. `dots`: each point is marked."""

    name: str
    points: Sequence[Point]
    noisy: bool = False
    dots: bool = False
    colour: int | None = None  # by default its place among the lines


def finite(points: Sequence[tuple[Any, Any]]) -> list[Point]:
    """Return the points whose coordinates are both finite numbers."""
    return [
        (float(x), float(y)) for x, y in points
        if all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < LARGEST for v in (x, y))
    ]  # fmt: skip


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    x: str = "step",
    mark: float | None = None,
    note: str = "",
) -> Markup | None:
    """Return a figure with lines over steps; None if no line has two points.

    `unit`: what the vertical axis counts, after the title. `mark`: a step to mark with a vertical line, which `note` explains.
    """
    lines = [
        replace(line, points=finite(line.points), colour=place if line.colour is None else line.colour)
        for place, line in enumerate(lines)
    ]
    lines = [line for line in lines if line.points]
    if all(len(line.points) < 2 for line in lines):
        return None
    xs = [point[0] for line in lines for point in line.points]
    ys = [value for line in lines for value in _range_of(line)]
    across = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = Axis(*_room(min(ys), max(ys)), HEIGHT - BOTTOM, TOP)
    drawn: list[Child] = [*_grid(across, up, x)]
    if mark is not None and across.low <= mark <= across.high:
        place = round(across(mark), 1)
        drawn.append(element("line", x1=place, x2=place, y1=TOP, y2=HEIGHT - BOTTOM, class_="even"))
    for line in lines:
        drawn += _drawn(line, across, up)
    told = "; ".join(_told(line) for line in lines)
    keys = [element("li", _key(line.colour or 0), short(line.name, 40), dir="auto") for line in lines]
    return element(
        "figure",
        element("figcaption", title, element("small", f" {unit}" if unit else None, f" {note}" if note else None)),
        element("ul", keys, class_="keys") if len(lines) > 1 else None,
        drawing(WIDTH, HEIGHT, f"{title}: {told}", *drawn),
    )  # fmt: skip


class Axis:
    """A linear map from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        space = 0.5 * abs(low) or 0.5  # around a single value
        self.low, self.high = (low, high) if high > low else (low - space, low + space)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _room(low: float, high: float) -> tuple[float, float]:
    """Return the ends of a vertical axis: from zero if the values are not far above it."""
    if low == high >= 0:
        return 0.0, 1.5 * high or 1.0
    if 0 <= low < 0.5 * high:
        return 0.0, high * 1.04
    space = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - space, high + space


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers between two others, at most `most` of them: multiples of 1, 2 or 5 times a power of ten."""
    width = high - low
    if not 0 < width < math.inf:
        return [low]
    size = 10 ** math.floor(math.log10(width / most))
    step = next(size * times for times in (1, 2, 5, 10, 20) if width / (size * times) <= most + 0.5)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + i) * step for i in range(count)]


def tick_text(value: float) -> str:
    """Format the number beside a tick: 0.25, 1,500, 20k, 1.5M, 2e-05."""
    size = abs(value)
    for least, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= least:
            return (
                f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[letter]:.4g}{letter}"
                if size < 1e13
                else f"{value:.2g}"
            )
    if size and size < 1e-3:
        return f"{value:.2g}"
    text = f"{value:,.4f}"
    return text.rstrip("0").rstrip(".") or "0"


def _grid(across: Axis, up: Axis, x: str) -> list[Markup]:
    """Return the axes with their numbers."""
    base = HEIGHT - BOTTOM
    made = []
    for value in ticks(up.low, up.high):
        y = round(up(value), 1)
        made.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        made.append(element("text", tick_text(value), x=LEFT - 6, y=round(y + 3.7, 1), text_anchor="end"))
    for value in ticks(across.low, across.high):
        place = round(across(value), 1)
        made.append(element("line", x1=place, x2=place, y1=base, y2=base + 4, class_="axis"))
        anchor = "end" if place > WIDTH - RIGHT - 12 else "middle"
        made.append(element("text", tick_text(value), x=place, y=base + 16, text_anchor=anchor))
    made.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis"))
    made.append(element("text", x, x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end"))
    return made


def _range_of(line: Line) -> list[float]:
    """Return the values that must fit in a chart: all, or without the outermost hundredth of a noisy line of many points."""
    values = sorted(y for _, y in line.points)
    if not line.noisy or len(values) < 100:
        return [values[0], values[-1]]
    cut = len(values) // 100
    smooth = [y for _, y in _average(line.points)]
    return [min(values[cut], *smooth), max(values[-1 - cut], *smooth)]


def _drawn(line: Line, across: Axis, up: Axis) -> list[Markup]:
    number = line.colour or 0
    colour = f"c{number % COLOURS}"

    def path(points: Sequence[Point]) -> str:
        inside = [(x, min(max(y, up.low), up.high)) for x, y in points]
        return " ".join(
            f"{'M' if not i else 'L'}{across(x):.1f} {up(y):.1f}" for i, (x, y) in enumerate(inside)
        )

    made = []
    points = thinned(line.points)
    if line.noisy and len(line.points) >= 20:
        made.append(element("path", d=path(points), class_=f"line faint {colour}"))
        points = thinned(_average(line.points))
    dash = DASHES[number % len(DASHES)]
    made.append(element("path", d=path(points), class_=f"line {colour}", stroke_dasharray=dash))
    if line.dots and len(points) <= 40:
        made += [
            element("circle", cx=round(across(x), 1), cy=round(up(y), 1), r=3, class_=f"dot {colour}")
            for x, y in points
        ]
    return made


def _average(points: Sequence[Point]) -> list[Point]:
    """Return the centred moving average over about a twentieth of the points."""
    reach = max(1, len(points) // 40)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    return [
        (x, (sums[high] - sums[low]) / (high - low))
        for i, (x, _) in enumerate(points)
        for low, high in [(max(0, i - reach), min(len(points), i + reach + 1))]
    ]


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """Return at most `most` points: means of neighbours, and the last point itself."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most - 1))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]
    return [*means, points[-1]]


def _told(line: Line) -> str:
    """Describe a line in words, for those who do not see it."""
    values = [y for _, y in line.points]
    return (
        f"{short(line.name, 40)} goes from {values[0]:.4g} to {values[-1]:.4g} in {len(values)} points, "
        f"lowest {min(values):.4g}, highest {max(values):.4g}"
    )


def _key(number: int) -> Markup:
    dash = DASHES[number % len(DASHES)]
    line = element("path", d="M1 4H21", class_=f"line c{number % COLOURS}", stroke_dasharray=dash)
    return element("svg", line, viewBox="0 0 22 8", aria_hidden="true")


def drawing(wide: float, high: float, told: str, /, *drawn: Child, **more: str | float) -> Markup:
    return element(
        "svg", element("title", told), *drawn, viewBox=f"0 0 {wide:g} {high:g}", role="img", aria_label=told, **more
    )  # fmt: skip


def whisker(
    value: float,
    low: float,
    high: float,
    ends: tuple[float, float],
    number: int = 0,
    width: int = 180,
    scale: bool = False,
) -> Markup:
    """Return a dot with its interval on an axis between `ends`, which `scale` writes beneath."""
    axis = Axis(*ends, 6, width - 6)
    places = [round(min(max(axis(v), 1), width - 1), 1) for v in (low, value, high)]
    colour, height = f"c{number % COLOURS}", 34 if scale else 18
    numbers = [
        element("text", tick_text(float(f"{end:.3g}")), x=x, y=30, text_anchor=anchor)
        for end, x, anchor in ((ends[0], 0, "start"), (ends[1], width, "end"))
    ]
    return drawing(
        width, height, f"{value:.4g}, 95% interval {low:.4g} to {high:.4g}",
        element("line", x1=0, x2=width, y1=9, y2=9, class_="grid"),
        element("line", x1=places[0], x2=places[2], y1=9, y2=9, class_=f"whisker {colour}"),
        [element("line", x1=p, x2=p, y1=5, y2=13, class_=f"whisker {colour}") for p in (places[0], places[2])],
        element("circle", cx=places[1], cy=9, r=4.5, class_=f"dot {colour}"), numbers if scale else None,
        width=width, height=height,
    )  # fmt: skip


def reliability(bins: Sequence[Sequence[float]], told: str) -> Markup:
    """Return a reliability diagram of bins [low, high, answers, mean probability, fraction correct]: the area of a dot shows
    how many answers are in its bin, and a perfectly calibrated model is on the diagonal."""
    across, up = Axis(0, 1, LEFT, WIDTH - 16), Axis(0, 1, 300 - BOTTOM, 16)
    total = sum(one[2] for one in bins) or 1
    made: list[Child] = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        y, place = round(up(value), 1), round(across(value), 1)
        made.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        made.append(element("text", tick_text(value), x=LEFT - 6, y=y + 3.7, text_anchor="end"))
        made.append(
            element(
                "text",
                tick_text(value),
                x=place,
                y=300 - BOTTOM + 16,
                text_anchor="end" if value == 1 else "middle",
            )
        )
    made.append(element("text", "probability of the answer", x=WIDTH - RIGHT, y=296, text_anchor="end"))
    made.append(element("path", d=f"M{across(0)} {up(0)}L{across(1)} {up(1)}", class_="even"))
    for low, high, count, mean, right in bins:
        x, y, even = round(across(mean), 1), round(up(right), 1), round(up(mean), 1)
        what = f"{low:.0%} to {high:.0%}: {count:,} answers, mean probability {mean:.1%}, correct {right:.1%}"
        made.append(element("line", x1=x, x2=x, y1=even, y2=y, class_="whisker c0", stroke_opacity=0.5))
        radius = round(3 + 9 * math.sqrt(count / total), 1)
        made.append(
            element(
                "circle", element("title", what), cx=x, cy=y, r=radius, class_="dot c0", fill_opacity=0.75
            )
        )
    return element(
        "figure",
        element(
            "figcaption",
            "Correct answers",
            element("small", " against their probability; the dashed line is perfect"),
        ),
        drawing(WIDTH, 300, told, *made),
    )
