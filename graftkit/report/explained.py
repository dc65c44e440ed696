"""Explanations of answers: in the terminal, and as a page. No torch here."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from graftkit.report.console import Console, count
from graftkit.report.html import (
    Child,
    Markup,
    Section,
    breakable,
    details,
    element,
    figure_text,
    page,
    short,
    table,
)

TOP = 5  # parts in the terminal
LISTED = 20  # parts in the table of a page
STRONG, WEAK = 0.5, 0.15  # of the largest score: bold, coloured
FOR, AGAINST = "dark_orange", "dodger_blue1"
CHARACTERS = 100  # of a training row in the terminal


def show_explanations(console: Console, found: list[dict[str, Any]]) -> None:
    """Print explanations: the answer, the text with its marks, the parts with the largest scores, and the check."""
    for one in found:
        console.rich.print(Text(f"{answer_of(one)}  ({method_of(one)})", style="bold"))
        for name in columns_of(one):
            console.rich.print(_marked(one, name))
        width = max((len(_part(part)) for part in _top(one)), default=0)
        for part in _top(one):
            console.line(f"  {_part(part):<{width}}  {part['score']:+.2f}")
        console.line(("check: " if one["deletion"]["holds"] else "check failed: ") + checked(one))
        for row in one["nearest"]:
            where = row["file"] if row["line"] is None else f"{row['file']}, line {row['line']}"
            told = said(row.get("label", "")), short(_asked(row), CHARACTERS), f"({where})"
            console.line("  ".join([f"near: {row['similarity']:.3f}", *filter(None, told)]))
        for note in one["notes"]:
            console.line(f"note: {note}")
        if one is not found[-1]:
            console.line()


def answer_of(one: dict[str, Any]) -> str:
    """Return what is explained, with its probability or value."""
    if "probability" not in one:
        return f"{one['value']:g}"
    label = one["label"] if "label" in one else one["answer"] or "no answer"
    word = f"{one['word']!r}: " if "word" in one else ""
    return f"{word}{label} {one['probability']:.3f}"


def method_of(one: dict[str, Any]) -> str:
    return {"grad_cam": "Grad-CAM"}.get(one["method"], one["method"].replace("_", " "))


def checked(one: dict[str, Any]) -> str:
    """Return what deleting the top parts did, as a sentence."""
    done = one["deletion"]
    if not done["parts"]:
        return "no part speaks for this answer, so there is none to delete"
    what, shown = ("probability" if "probability" in one else "value"), done
    if "log_odds" in done and figure_text(done["before"], 3) == figure_text(done["without_top"], 3):
        what, shown = "log-odds", done["log_odds"]
    verb = "go" if what == "log-odds" else "goes"
    parts = "the part" if done["parts"] == 1 else f"the {count(done['parts'])} parts"
    text = (
        f"without {parts} of {count(done['of'])} with the highest score, the {what} {verb} from {figure_text(shown['before'], 3)} "
        f"to {figure_text(shown['without_top'], 3)}"
    )
    if shown["without_random"] is not None:
        text += f"; without as many others, to {figure_text(shown['without_random'], 3)} on average"
    if not done["holds"]:
        text += ". The scores do not show what this answer depends on"
    return text


def columns_of(one: dict[str, Any]) -> list[str]:
    """Return the names of the texts that have marks."""
    if "text" not in (one["parts"] or [{}])[0]:
        return []
    return list(dict.fromkeys(part.get("column", "text") for part in one["parts"]))


def said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _text_of(one: dict[str, Any], name: str) -> str:
    value = one.get(name, one.get("tokens", ""))
    return " ".join(value) if isinstance(value, list) else str(value)


def _largest(one: dict[str, Any]) -> float:
    return max((abs(part["score"]) for part in one["parts"]), default=0.0) or 1.0


def _top(one: dict[str, Any]) -> list[dict[str, Any]]:
    ranked = sorted(one["parts"], key=lambda part: -abs(part["score"]))
    return [part for part in ranked[:TOP] if part["score"]]


def _part(part: dict[str, Any]) -> str:
    """Return what a part is called."""
    if "text" in part:
        return short(part["text"], 40)
    if "box" in part:
        left, top, right, bottom = part["box"]
        return f"x {left}-{right}, y {top}-{bottom}"
    return f"{part['start']:.2f}-{part['end']:.2f} s"


def _asked(row: dict[str, Any]) -> str:
    """Return the inputs of a training row as one text, without what says where it is."""
    asked = [
        " ".join(map(str, v)) if k == "tokens" else said(v)
        for k, v in row.items() if k not in ("file", "line", "label", "similarity", "id")
    ]  # fmt: skip
    return "" if row["line"] is None else " | ".join(asked)


def _marked(one: dict[str, Any], name: str) -> Text:
    """Return a text with its marks, which a terminal without colours leaves out."""
    text, largest = Text(_text_of(one, name)), _largest(one)
    for part in one["parts"]:
        share = abs(part["score"]) / largest
        if part.get("column", name) == name and share >= WEAK:
            colour = FOR if part["score"] > 0 else AGAINST
            text.stylize(f"bold {colour}" if share >= STRONG else colour, part["start"], part["end"])
    return text


def explanations_page(
    run: str, task: str, found: list[dict[str, Any]], pictures: list[str | None], near: list[list[str | None]]
) -> str:  # fmt: skip
    """Return a page with explanations. `pictures`: of each, an image with marks as a data URI, or None for texts; `near`:
    likewise of its nearest training rows."""
    sections = [
        Section(f"{number}. {answer_of(one)}", f"answer-{number}", _content(one, picture, rows))
        for number, (one, picture, rows) in enumerate(zip(found, pictures, near), start=1)
    ]
    lead = [
        element("p", short(run, 100), class_="over", dir="auto"),
        element("h1", "Why it answered", element("small", short(task, 160))),
        element("p", "Orange parts speak for the answer, ", "blue ones against it. A score says what share of all evidence a "
                "part has, not that the answer is right.", class_="quiet"),
    ]  # fmt: skip
    return page(
        f"Explained: {short(run, 60)}", lead, sections, f"Made by `graftkit explain` from the run in {run}."
    )


def _content(one: dict[str, Any], picture: str | None, near: list[str | None]) -> Child:
    marked = [_marked_text(one, name) for name in columns_of(one)]
    name = short(str(one.get("image", one.get("audio", ""))).rpartition("/")[2], 80)
    image = None
    if picture is not None:
        caption = element("figcaption", name, element("small", f" {method_of(one)}"))
        image = element(
            "figure", caption, element("img", src=picture, alt=f"{name} with the parts that speak for {answer_of(one)}"),
            class_="why",
        )  # fmt: skip
    failed = None
    check = checked(one)
    text = element("p", check[:1].upper(), check[1:], ".")
    if not one["deletion"]["holds"]:
        failed = element(
            "aside",
            element("p", element("strong", "The check failed")),
            text,
            class_="note",
            aria_label="Check",
        )
    notes = [element("p", note, class_="quiet", dir="auto") for note in one["notes"]]
    return [
        marked, image, failed or [element("h3", "Checked by deletion"), text], notes, _scores(one), _neighbours(one, near),
    ]  # fmt: skip


def _marked_text(one: dict[str, Any], name: str) -> Markup:
    text, largest, at = _text_of(one, name), _largest(one), 0
    pieces: list[Child] = []
    for part in sorted((p for p in one["parts"] if p.get("column", name) == name), key=lambda p: p["start"]):
        share = abs(part["score"]) / largest
        if share < WEAK / 3 or part["start"] < at:
            continue
        pieces += [text[at : part["start"]], element(
            "mark", text[part["start"] : part["end"]], class_="c1" if part["score"] > 0 else "c0",
            style=f"--v:{share:.2f}", title=f"{part['score']:+.3f}",
        )]  # fmt: skip
        at = part["end"]
    lead = (
        element("span", f"{name.replace('_', ' ')}: ", class_="quiet") if len(columns_of(one)) > 1 else None
    )
    return element("p", lead, pieces, text[at:], class_="why", dir="auto")


def _scores(one: dict[str, Any]) -> Markup:
    ranked = sorted(one["parts"], key=lambda part: -abs(part["score"]))[:LISTED]
    rows: list[list[Child]] = [[_part(part), f"{part['score']:+.3f}"] for part in ranked]
    caption = f"{len(ranked)} of {count(len(one['parts']))} parts, {method_of(one)}"
    if "completeness" in one:
        caption += f"; sum of all before scaling {one['completeness']['sum']:.3f}, which should be "
        caption += f"{one['completeness']['difference']:.3f}"
    return details("Scores", table(caption, ["part", "score"], rows))


def _neighbours(one: dict[str, Any], near: list[str | None]) -> Child:
    if not one["nearest"]:
        return None
    items = []
    for row, picture in zip(one["nearest"], near):
        name = short(row["file"].rpartition("/")[2], 80)
        where = name if row["line"] is None else f"{name}, line {row['line']}"
        kind = "sound" if "audio" in row else None  # a spectrogram
        image = (
            None if picture is None else element("img", src=picture, alt=name, loading="lazy", class_=kind)
        )
        text = element("p", short(_asked(row), 400), class_="text", dir="auto") if _asked(row) else None
        label = element(
            "dl", element("dt", "label"), element("dd", breakable(said(row.get("label", "")))), class_="said"
        )
        lead = element("p", f"{where}, similarity {row['similarity']:.3f}", class_="where")
        items.append(element("li", image, lead, text, label if "label" in row else None))
    return [
        element("h3", "Nearest training rows"),
        element("ul", items, class_="rows grid" if any(near) else "rows"),
    ]
