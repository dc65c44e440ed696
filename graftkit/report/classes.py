"""What a report says about classes: what to do next for each, which are confused, and whether probabilities can be trusted."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graftkit.report.finished import Finished, mapping, number
from graftkit.report.html import (
    Child,
    Markup,
    Section,
    breakable,
    details,
    element,
    figure_text,
    scrolling,
    short,
    table,
)
from graftkit.report.svg import reliability

FIRST, MOST = 25, 200  # classes that are shown at once, and in all
MATRIX = 30  # classes of the largest matrix
PAIRS = 20
LARGEST = 1e15  # of a count
BRIEF = 5  # characters of labels that fit above a column
FEW = 5  # training rows
LABEL = 60  # characters


@dataclass
class Class:
    """One class: `rows` evaluated, of which `missed` had another answer, and `false` answers of this class elsewhere."""

    name: str
    trained: int | None
    rows: int
    precision: float
    recall: float
    f1: float
    missed: int = 0
    false: int = 0
    taken_for: list[tuple[int, str]] = field(default_factory=list)

    def advice(self, usual: float) -> str:
        """Say what to do next. `usual`: the median number of training rows of a class."""
        if not self.rows:
            return "add rows to evaluate on"
        if not self.missed and not self.false:
            return ""
        if self.trained is not None and self.trained < max(FEW, usual / 2):
            return f"add training rows (it has {self.trained:,})"
        if self.missed == self.rows and not self.false and not self.taken_for:
            return "never answered: train longer, or add rows"
        if self.taken_for and self.taken_for[0][0] >= max(2, self.missed / 2):
            return f"compare with {short(self.taken_for[0][1], LABEL)}"
        if self.missed > 2 * self.false:
            return "answered too rarely: look at the rows missed"
        if self.false > 2 * self.missed:
            return "answered too often: look at the rows given this answer"
        return "look at its rows"


def classes_of(run: Finished) -> list[Class]:
    """Return the classes of a run's metrics, those with the most mistakes first."""
    trained = mapping(mapping(mapping(run.plan.get("statistics")).get("train")).get("labels"))
    classes = []
    for name, given in mapping(run.metrics.get("per_class")).items():
        rows, precision, recall, f1 = (
            _sane(mapping(given).get(key)) for key in ("rows", "precision", "recall", "f1")
        )
        right = round(recall * rows)
        false = round(right / precision - right) if precision else 0
        known = _sane(trained.get(name)) if name in trained else None
        classes.append(Class(
            name, None if known is None else int(known), int(rows), precision, recall, f1, int(rows) - right, false
        ))  # fmt: skip
    for target, answer, count in cells_of(run, len(classes)):
        classes[target].taken_for.append((count, classes[answer].name))
    wrongly: dict[int, int] = defaultdict(int)
    for _, answer, count in cells_of(run, len(classes)):
        wrongly[answer] += count
    for place, count in wrongly.items():
        classes[place].false = max(classes[place].false, count)
    return sorted(classes, key=lambda one: (-(one.missed + one.false / 2), one.f1, one.name))


def _sane(value: Any) -> float:
    """Return a number from 0 to a quadrillion; 0 for what is none, such as NaN, which somebody may have written there."""
    known = number(value)
    return float(known) if known is not None and 0 <= known < LARGEST else 0.0


def cells_of(run: Finished, classes: int) -> list[tuple[int, int, int]]:
    """Return the cells [target, answer, rows] off the diagonal of the confusion matrix, as far as they are well formed."""
    given = run.metrics.get("confusion")
    return [
        (cell[0], cell[1], cell[2]) for cell in (given if isinstance(given, list) else ())
        if isinstance(cell, list) and len(cell) == 3 and all(type(value) is int for value in cell)
        and 0 <= cell[0] < classes and 0 <= cell[1] < classes and cell[2] > 0
    ]  # fmt: skip


def class_sections(run: Finished) -> list[Section]:
    """Return the sections about classes and their confusion; none for a task without classes."""
    classes = classes_of(run)
    if not classes:
        return []
    known = [one.trained for one in classes if one.trained is not None]
    usual = statistics.median(known) if known else 0.0
    unit = short(mapping(mapping(run.plan.get("statistics")).get("train")).get("counted", "rows"), 20)
    heads = ["class", "what to do next", "most confused with", *([f"training {unit}"] if known else []),
             unit, "missed", "precision", "recall", "F1"]  # fmt: skip
    rows = [_row(one, bool(known), usual) for one in classes[:MOST]]
    intro = element("p", "The classes with the most mistakes come first.", class_="quiet")
    told = f"Classes by mistakes on the {run.split()} rows"
    parts: list[Child] = [intro, table(told, heads, rows[:FIRST], words=3)]
    if len(rows) > FIRST:
        beyond = f" (all {len(classes):,} are in result.json)" if len(classes) > MOST else ""
        parts.append(
            details(f"{len(rows) - FIRST} more classes{beyond}", table(told, heads, rows[FIRST:], words=3))
        )
    sections = [Section("Classes", "classes", parts)]
    cells = cells_of(run, len(classes))
    if cells:
        names = list(mapping(run.metrics.get("per_class")))
        small = len(names) <= MATRIX
        sections.append(
            Section(
                "Confusion", "confusion", _matrix(run, names, cells) if small else _pairs(run, names, cells)
            )
        )
    return sections


def _row(one: Class, trained: bool, usual: float) -> list[Child]:
    others = ", ".join(f"{short(name, LABEL)} ({count:,})" for count, name in one.taken_for[:2])
    value = min(one.recall, 1.0)
    meter = element("span", element("i"), class_="meter", style=f"--v:{value:.3f}", aria_hidden="true")
    return [
        breakable(short(one.name, LABEL)), breakable(one.advice(usual)), breakable(others), *([figure_text(one.trained)] if trained else []),
        f"{one.rows:,}", f"{one.missed:,}", figure_text(one.precision, 3),
        element("span", meter, figure_text(one.recall, 3)) if one.rows else "–", figure_text(one.f1, 3),
    ]  # fmt: skip


def _matrix(run: Finished, names: Sequence[str], cells: list[tuple[int, int, int]]) -> Child:
    per_class = mapping(run.metrics.get("per_class"))
    support = [int(_sane(mapping(per_class[name]).get("rows"))) for name in names]
    counts = {(target, answer): count for target, answer, count in cells}
    for i, rows in enumerate(support):
        counts[i, i] = rows - sum(
            count for (target, answer), count in counts.items() if target == i != answer
        )

    def cell(i: int, j: int) -> Markup:
        count = counts.get((i, j), 0)
        if not count:
            return element("td", "·", class_="none")
        share = f"--v:{count / max(1, support[i]):.3f}"
        return element("td", f"{count:,}", class_="right" if i == j else "wrong", style=share)

    brief = max(map(len, names)) <= BRIEF  # else the columns are numbered
    head = [
        element(
            "th",
            name if brief else str(j + 1),
            scope="col",
            abbr=short(name, LABEL),
            title=short(name, LABEL),
        )
        for j, name in enumerate(names)
    ]
    body = [
        element("tr", element("th", name if brief else f"{i + 1} {short(name, 32)}", scope="row", dir="auto"),
                [cell(i, j) for j in range(len(names))])
        for i, name in enumerate(names)
    ]  # fmt: skip
    told = f"A row for each class of the {run.split()} rows, a column for each answer{'' if brief else ', by number'}."
    made = element(
        "table", element("caption", "Confusion matrix"),
        element("thead", element("tr", element("th", "class", scope="col"), head)), element("tbody", body), class_="matrix",
    )  # fmt: skip
    return [element("p", told, class_="quiet"), scrolling("Confusion matrix", made)]


def _pairs(run: Finished, names: Sequence[str], cells: list[tuple[int, int, int]]) -> Child:
    rows: list[list[Child]] = [
        [breakable(short(names[target], LABEL)), breakable(short(names[answer], LABEL)), f"{count:,}"]
        for target, answer, count in cells[:PAIRS]
    ]
    caption = f"The pairs of classes that are confused most often in the {run.split()} rows"
    return table(caption, ["class", "answered", "rows"], rows, words=2)


def calibration_sections(run: Finished) -> list[Section]:
    """Return the section about calibration, if the metrics have it."""
    given = mapping(run.metrics.get("calibration"))
    stored = given.get("bins")
    bins = [
        [float(value) for value in one]
        for one in (stored if isinstance(stored, list) else ())
        if _is_bin(one)
    ]
    error = _sane(given.get("error"))
    if not bins:
        return []
    answers = sum(one[2] for one in bins)
    mean = sum(one[2] * one[3] for one in bins) / max(answers, 1)
    right = sum(one[2] * one[4] for one in bins) / max(answers, 1)
    lean = "about right" if abs(mean - right) < 0.01 else "too high" if mean > right else "too low"
    told = (
        f"Its probabilities are {lean} on the whole: on average {mean:.1%} where {right:.1%} are correct. The expected "
        f"calibration error is {error:.3f}: the mean distance between the two, over bins of a tenth."
    )
    rows: list[list[Child]] = [
        [f"{low:.0%} to {high:.0%}", f"{int(count):,}", f"{p:.1%}", f"{share:.1%}"]
        for low, high, count, p, share in bins
    ]
    numbers = table("The same in numbers", ["probability", "answers", "mean probability", "correct"], rows)
    parts = [element("p", told), element("div", reliability(bins, told), numbers, class_="figures")]
    return [Section("Calibration", "calibration", [*parts, *_temperature(run)])]


def _temperature(run: Finished) -> list[Child]:
    """Return what temperature scaling changes, if the run was calibrated."""
    given = mapping(run.result.get("confidence"))
    test = mapping(given.get("test"))
    temperature, rows = _sane(given.get("temperature")), int(_sane(given.get("rows")))
    if not temperature or not rows:
        return []
    figures = test or given
    before, after = _sane(figures.get("before")), _sane(figures.get("after"))
    where = (
        "on the test rows" if test
        else "on the rows that it was fitted on, which may have selected the weights too, so it will be higher on new rows"
    )  # fmt: skip
    return [element("p",
        f"This is before temperature scaling. predict and export divide the logits by {temperature:.3g}, fitted on {rows:,} "
        f"answers that were not trained on: the calibration error is {after:.3f} with it and {before:.3f} without, {where}."
    )]  # fmt: skip


def _is_bin(given: Any) -> bool:
    """Return whether a value is a bin of `calibration`: five numbers, none of them negative, infinite or NaN."""
    return (
        isinstance(given, list)
        and len(given) == 5
        and all(number(v) is not None and 0 <= v < LARGEST for v in given)
    )
