"""Rows to check by hand: labels that are likely wrong and rows that occur twice, in the report of a run and of a check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftkit.report.console import count
from graftkit.report.finished import Finished, mapping, number
from graftkit.report.html import Child, Markup, Section, breakable, details, element, short
from graftkit.report.summary import said

PARTS = {"train": "training", "eval": "evaluation", "test": "test"}
LISTED = 10
OPEN = 5  # rows that are shown at once
TEXT = 400


def doubtful_sections(run: Finished) -> list[Section]:
    """Return the section with rows to check; none if there are none, or for a run of an earlier version."""
    found = mapping(run.result.get("noticed"))
    seen = {str(row.get("where")): shown for row, shown in zip(run.worst, run.previews)}
    content = [*_suspects(found, seen), *_repeated(found)]
    if not content:
        return []
    command = f"graftkit data check {run.folder}/recipe.yaml --labels --html rows.html"
    told = element("p", "To check the labels of all rows: ", element("code", command), class_="quiet")
    return [Section("Rows to check", "doubtful", [*content, told])]


def part_name(name: object) -> str:
    return PARTS.get(str(name), short(name, 20))


def place_of(row: dict[str, Any]) -> str:
    """Return the name of a row's file without folders, and its line."""
    name = short(str(row.get("file", "")).replace("\\", "/").rpartition("/")[2], 80)
    return name if row.get("line") is None else f"{name}, line {short(row['line'], 12)}"


def text_of(row: dict[str, Any]) -> Child:
    """Return the text of a row; none for an image or a sound in a file of its own, whose place says it."""
    text = short(row.get("text", ""), TEXT)
    return None if row.get("line") is None and "word" not in row else text


def label_of(label: Any) -> Markup:
    return breakable(short(said(label), 120))


def item(
    row: dict[str, Any], beside: Child, facts: Sequence[tuple[str, Child]], shown: dict[str, str]
) -> Markup:
    """Return a row of a list: a picture or a sound, where it is, its text, and facts. `shown`: its previews."""
    picture = shown.get("image") or shown.get("spectrogram")
    name = place_of(row)
    media: list[Child] = []
    if picture:
        media.append(
            element(
                "img", src=picture, alt=name, loading="lazy", class_=None if "image" in shown else "sound"
            )
        )
    if "sound" in shown:
        media.append(
            element("audio", controls=True, preload="none", src=shown["sound"], aria_label=f"Play {name}")
        )
    lead = element("p", name, beside, class_="where")
    text = text_of(row)
    pairs = [(element("dt", key), element("dd", value, dir="auto")) for key, value in facts]
    return element(
        "li", media, lead, element("p", text, class_="text", dir="auto") if text else None, element("dl", pairs, class_="said"),
    )  # fmt: skip


def listed(items: Sequence[Markup], most: int = OPEN, grid: str = "") -> list[Child]:
    """Return a list of rows, all but the first `most` closed."""
    shown: list[Child] = [element("ul", list(items[:most]), class_=f"rows{grid}")]
    if items[most:]:
        shown.append(
            details(
                f"{count(len(items[most:]))} more", element("ul", list(items[most:]), class_=f"rows{grid}")
            )
        )
    return shown


def _parts(given: Any, *keys: str) -> list[dict[str, Any]]:
    """Return the well-formed objects of a list of a result that may have been edited."""
    return [
        one for one in (given if isinstance(given, list) else ())
        if isinstance(one, dict) and all(number(one.get(key)) is not None for key in keys) and isinstance(one.get("shown"), list)
    ]  # fmt: skip


def _rows(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in one["shown"][:LISTED] if isinstance(row, dict)]


def _suspects(found: dict[str, Any], seen: dict[str, dict[str, str]]) -> list[Child]:
    content: list[Child] = []
    for one in _parts(found.get("suspects"), "count", "judged"):
        if not one["count"]:
            continue
        words = one.get("of") == "words"
        what = f"{part_name(one.get('data'))} {'words' if words else 'rows'}"
        told = (
            f"For {count(one['count'])} of {count(one['judged'])} {what} the model finds another {'tag' if words else 'label'} at "
            "least nine times as likely as theirs. Either the model is wrong, or the row."
        )
        items = []
        for row in _rows(one):
            score = number(row.get("score"))
            sure = None if score is None else f", certainty {score:.3f}"
            word = [("word", element("strong", short(row["word"], 60)))] if "word" in row else []
            facts = [*word, ("given", label_of(row.get("given"))), ("rather", label_of(row.get("suggested")))]
            items.append(
                item(row, sure, facts, seen.get(str(row.get("file")), {}) if row.get("line") is None else {})
            )
        content += [
            element("h3", f"Labels that are likely wrong: {what}"),
            element("p", told),
            *listed(items),
        ]
    return content


def _repeated(found: dict[str, Any]) -> list[Child]:
    content: list[Child] = []
    for one in _parts(found.get("repeated"), "rows", "total"):
        name, other = part_name(one.get("data")), part_name(one.get("of"))
        same, differ = one.get("data") == one.get("of"), number(one.get("other_answer"))
        answers = f", {count(differ)} of them with another answer" if differ else ""
        title = f"{name} rows that occur twice" if same else f"{name} rows that are {other} rows too"
        told = f"{count(one['rows'])} of {count(one['total'])} {name} rows repeat {'an earlier one' if same else f'{other} rows'}{answers}."
        items = [
            item(row, f" = {place_of(mapping(row.get('of')))}", labels_of(row), {}) for row in _rows(one)
        ]
        content += [element("h3", title[:1].upper() + title[1:]), element("p", told), *listed(items, 3)]
    return content


def labels_of(row: dict[str, Any]) -> list[tuple[str, Child]]:
    """Return the labels of a row and of the earlier one that it repeats."""
    here, there = row.get("label"), row.get("label_there")
    if here is None:
        return [("answer", "another one than there")] if row.get("same_answer") is False else []
    return [("label", label_of(here)), *([] if here == there else [("there", label_of(there))])]
