"""The worst examples of a run in its report: texts with marks, pictures, sounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftkit.report.finished import Finished, mapping, number
from graftkit.report.html import Child, Markup, Section, element, figure_text, short
from graftkit.report.summary import said

TEXT = 700  # characters of a value
AROUND = 160  # characters before the first mark and after the last
ASIDE = ("where", "id", "expected", "answer", "marks", "loss")
MARKS = 50  # of one text


def mistake_sections(run: Finished) -> list[Section]:
    """Return the section with the worst examples; none if there are none."""
    if not run.worst:
        return []
    kinds = {kind for shown in run.previews for kind in shown}
    listed = "rows" + (" grid" if kinds else "") + (" wide" if "sound" in kinds else "")
    judged = bool(run.metrics.get("per_class"))  # else an answer is not right or wrong, but better or worse
    rows = [_row(row, shown, judged) for row, shown in zip(run.worst, run.previews)]
    told = f"The {run.split()} rows with the largest errors. Wrong labels are often among them."
    return [
        Section(
            "Worst rows", "worst", [element("p", told, class_="quiet"), element("ul", rows, class_=listed)]
        )
    ]


def _row(row: dict[str, Any], shown: dict[str, str], judged: bool) -> Markup:
    loss = number(row.get("loss"))
    where = short(str(row.get("where", "")).rpartition("/")[2], 80)
    lead = element(
        "p", where, None if loss is None else f", loss {figure_text(float(loss), 2)}", class_="where"
    )
    marks = mapping(row.get("marks"))
    marked = str(marks.get("of", "text"))
    texts = [
        _value(name, value) for name, value in row.items()
        if name not in ASIDE and name not in ("image", "audio") and not isinstance(value, float)
        and not (marks and name == marked)
    ]  # fmt: skip
    return element(
        "li", _media(shown, row), lead, texts, _answers(row, marks, str(row.get(marked) or ""), judged)
    )


def _value(name: str, value: Any) -> Markup:
    lead = None if name == "text" else element("span", f"{name.replace('_', ' ')}: ", class_="quiet")
    return element("p", lead, _cut(said(value)), class_="text", dir="auto")


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} … ({len(text) - TEXT:,} more characters)"


def _media(shown: dict[str, str], row: dict[str, Any]) -> Child:
    expected, answer = short(said(row.get("expected")), 60), short(said(row.get("answer")), 60)
    if "image" in shown:
        name = short(row.get("image", "image"), 80)
        return element(
            "img", src=shown["image"], alt=f"{name}: {expected}, answered {answer}", loading="lazy"
        )
    if "sound" not in shown:
        return None
    name = short(row.get("audio", "sound"), 80)
    picture = (
        element("img", src=shown["spectrogram"], alt=f"Spectrogram of {name}", class_="sound")
        if "spectrogram" in shown else None
    )  # fmt: skip
    return [
        picture,
        element("audio", controls=True, preload="none", src=shown["sound"], aria_label=f"Play {name}"),
    ]


def _answers(row: dict[str, Any], marks: dict[str, Any], text: str, judged: bool) -> Markup:
    expected = _marked(text, marks.get("expected"), 2) if marks else _cut(said(row.get("expected")))
    answer = _marked(text, marks.get("answer"), 1) if marks else _cut(said(row.get("answer")))
    return element(
        "dl", element("dt", "expected"), element("dd", expected, class_="right" if judged else None, dir="auto"),
        element("dt", "answered"), element("dd", answer, class_="wrong" if judged else None, dir="auto"), class_="said",
    )  # fmt: skip


def _marked(text: str, marks: Any, colour: int) -> Child:
    """Return a text with marks [start, end, label], cut to what is around them."""
    spans = _spans(marks, len(text))
    if not spans:
        return [element("span", "nothing: ", class_="quiet"), short(text, 2 * AROUND)]
    start, end = max(0, spans[0][0] - AROUND), min(len(text), spans[-1][1] + AROUND, spans[0][0] + 3 * TEXT)
    if start:  # at the next word, if it is near
        start = text.find(" ", start, min(start + 20, spans[0][0])) + 1 or start
    parts: list[Child] = ["… " if start else None]
    at = start
    for first, last, label in spans:
        if first < at or first >= end:
            continue
        parts.append(text[at:first])
        kind = element("small", short(label, 30)) if label else None
        parts.append(element("mark", text[first : min(last, end)], kind, class_=f"c{colour}"))
        at = min(last, end)
    return [*parts, text[at:end], "…" if end < len(text) else None]


def _spans(marks: Any, length: int) -> Sequence[tuple[int, int, str]]:
    """Return the well-formed marks within a text of `length` characters, in order."""
    found = [
        (mark[0], mark[1], str(mark[2])) for mark in (marks if isinstance(marks, list) else ())
        if isinstance(mark, list) and len(mark) == 3 and type(mark[0]) is int and type(mark[1]) is int
        and 0 <= mark[0] < mark[1] <= length
    ]  # fmt: skip
    return sorted(found)[:MARKS]
