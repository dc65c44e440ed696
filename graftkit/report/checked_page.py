"""What `data check` found, as a page: problems, labels that are likely wrong, repeated rows, and outliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftkit.report.console import count
from graftkit.report.doubtful import item, label_of, listed, part_name, place_of
from graftkit.report.html import Child, Markup, Section, element, page, short
from graftkit.report.values import Check, Finding

MOST = 100  # of each kind
FIRST = 20  # that are shown at once
NEAR = 160  # characters of a near row
Previews = Mapping[tuple[str, int], dict[str, str]]


def check_page(found: Check, task: str, model: str | None, previews: Previews) -> str:
    """Return the page. `previews`: pictures and sounds by (data, row)."""
    suspects, outliers = found.suspects or [], found.outliers or []
    sections = [
        _findings("Problems", "problems", found.problems),
        _section("Labels that are likely wrong", "labels", _LABELS, suspects, [_suspect(one, previews) for one in suspects[:MOST]]),
        _section("Rows in two parts of the data", "leaks", _LEAKS, found.leaks, [_pair(one, previews) for one in found.leaks[:MOST]]),
        _section("Rows that occur twice", "duplicates", _TWICE, found.duplicates,
                 [_pair(one, previews) for one in found.duplicates[:MOST]]),
        _section("Rows far from all others", "outliers", _FAR, outliers, [_outlier(one, previews) for one in outliers[:MOST]]),
        _findings("Warnings", "warnings", found.warnings),
    ]  # fmt: skip
    figures = [("Problems", len(found.problems))]
    figures += [] if found.suspects is None else [("Labels to check", len(suspects))]
    figures += [("Leaks", len(found.leaks)), ("Duplicates", len(found.duplicates))]
    figures += [] if found.outliers is None else [("Outliers", len(outliers))]
    tiles = [element("div", element("dt", name), element("dd", count(value))) for name, value in figures]
    rows = [
        element("p", f"{part_name(name)}: {short(part['file'], 160)}, {count(part['good'])} good rows",
                f", {count(part['bad'])} bad" if part["bad"] else None, class_="quiet", dir="auto")
        for name, part in found.rows.items()
    ]  # fmt: skip
    lead: list[Child] = [
        element("p", short(model or "no model", 100), class_="over", dir="auto"),
        element("h1", "The rows", element("small", short(task, 160))), rows,
        element("div", element("dl", tiles, class_="tiles"), class_="headline"),
    ]  # fmt: skip
    return page(
        f"Rows: {short(task, 60)}", lead, [one for one in sections if one], "Made by `graftkit data check`."
    )


_LABELS = (
    "A model that was fitted to other rows finds another label more likely, the surest first. A label here is not always wrong: "
    "read down from the top, and stop where most are right."
)
_LEAKS = "Evaluation and test rows that are also rows of an earlier part make metrics too good."
_TWICE = "Rows that repeat an earlier one of the same part, or nearly so."
_FAR = "Rows that are unlike all others: another language, no text at all, another subject."


def _section(title: str, name: str, told: str, rows: Sequence[Any], items: list[Markup]) -> Section | None:
    if not rows:
        return None
    grid = " grid wide" if any("<img" in one.text for one in items[:FIRST]) else ""
    return Section(
        f"{title}: {count(len(rows))}",
        name,
        [element("p", told), *listed(items, FIRST, grid), _more(rows, items)],
    )


def _findings(title: str, name: str, findings: Sequence[Finding]) -> Section | None:
    if not findings:
        return None
    items = [
        element("li", element("p", short(f"{one.data} {one.file}{f', {one.place}' if one.place else ''}", 200), class_="where"),
                element("p", short(one.text, 400), class_="text", dir="auto"))
        for one in findings[:MOST]
    ]  # fmt: skip
    return Section(f"{title}: {count(len(findings))}", name, [*listed(items), _more(findings, items)])


def _more(rows: Sequence[Any], items: list[Markup]) -> Child:
    more = len(rows) - len(items)
    return element("p", f"and {count(more)} more, which --json lists", class_="quiet") if more else None


def _shown(one: Mapping[str, Any], previews: Previews) -> dict[str, str]:
    return previews.get((one["data"], one["row"]), {})


def _suspect(one: dict[str, Any], previews: Previews) -> Markup:
    facts: list[tuple[str, Child]] = [
        ("given", label_of(one["given"])),
        ("rather", label_of(one["suggested"])),
    ]
    if "word" in one:
        facts.insert(0, ("word", element("strong", short(one["word"], 60))))
    texts = [_near(row) for row in one["nearest_rows"]]
    labels = [label_of(row["label"]) for row in one["nearest_rows"]]
    near: Child = [
        element("div", label, element("span", text, class_="quiet")) for label, text in zip(labels, texts)
    ]
    if not any(texts):  # pictures and sounds
        near = [part for label in labels for part in (", ", label)][1:]
    return item(one, f", certainty {one['score']:.3f}", [*facts, ("near", near)], _shown(one, previews))


def _near(row: dict[str, Any]) -> str:
    word = f" {row['word']!r} in:" if "word" in row else ""
    return "" if row["line"] is None else f"{word} {short(row['text'], NEAR)}"


def _pair(one: dict[str, Any], previews: Previews) -> Markup:
    what = "the same as" if one["kind"] == "exact" else f"similarity {one['similarity']:.3f} to"
    near = (
        short(one["of"].get("text", ""), 400)
        if one["kind"] == "near" and one["of"]["line"] is not None
        else ""
    )
    there: list[tuple[str, Child]] = [("there", near)] if near else []
    told = {True: "the same", False: "another one than there", None: "unknown"}[one["same_label"]]
    return item(one, f", {what} {place_of(one['of'])}", [*there, ("label", told)], _shown(one, previews))


def _outlier(one: dict[str, Any], previews: Previews) -> Markup:
    return item(one, f", distance {one['distance']:.3f}", [], _shown(one, previews))
