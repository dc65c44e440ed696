"""Print what `data check` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftkit.report.console import Console, count
from graftkit.report.summary import statistics_lines
from graftkit.report.values import Check, Finding

SHOWN = 20  # findings of each file
WIDTH = 80  # characters of a text


def show_check(console: Console, found: Check) -> None:
    """Print problems, warnings and statistics, by file; the JSON has all of them."""
    console.heading("Data")
    for name, part in found.rows.items():
        bad = f", {count(part['bad'])} bad" if part["bad"] else ""
        rows = f"{count(part['good'])} good row{'s' * (part['good'] != 1)}"
        console.line(f"  {name:<5}  {part['file']}: {rows}{bad}")
    for title, findings in (("Problems", found.problems), ("Warnings", found.warnings)):
        if findings:
            console.heading(f"{title}: {count(len(findings))}")
            _show(console, findings)
    if found.statistics:
        console.heading("Statistics")
        console.pairs(
            [
                (f"{name} {title}", text)
                for name, part in found.statistics.items()
                for title, text in statistics_lines(part)
            ]
        )
    if found.suspects is not None:
        _show_suspects(console, found)
    told = f"{count(len(found.warnings))} warning{'s' * (len(found.warnings) != 1)}"
    if found.ok:
        console.line(f"\nno problems, {told}")
    else:
        number = len(found.problems)
        console.line(f"\n{count(number)} problem{'s' * (number != 1)}, {told}")


def _show(console: Console, findings: list[Finding]) -> None:
    by_file: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        by_file.setdefault((finding.data, finding.file), []).append(finding)
    for (name, file), some in by_file.items():
        console.line(f"  {name}{f' {file}' if file else ''} ({count(len(some))})")
        for finding in some[:SHOWN]:
            console.line(f"    {finding.place + ': ' if finding.place else ''}{finding.text}")
        if len(some) > SHOWN:
            console.line(f"    ... and {count(len(some) - SHOWN)} more; --json has all")


def _show_suspects(console: Console, found: Check) -> None:
    """Print the most suspicious labels, near duplicates and outliers."""
    suspects, outliers = found.suspects or [], found.outliers or []
    console.heading(f"Labels that another one fits better: {count(len(suspects))}")
    for one in suspects[:SHOWN]:
        console.line(
            f"  {one['score']:.3f}  {_where(one)}: {_named(one['given'])}, or {_named(one['suggested'])}?  {_worded(one)}"
        )
    _show_more(console, suspects)
    near = [pair for pair in (*found.leaks, *found.duplicates) if pair["kind"] == "near"]
    console.heading(f"Rows that are nearly the same: {count(len(near))}")
    for pair in near[:SHOWN]:
        other = "" if pair["same_label"] else ", with another label"
        console.line(f"  {_where(pair)}: nearly the same as {_where(pair['of'])}{other}")
    _show_more(console, near)
    console.heading(f"Rows far from all others: {count(len(outliers))}")
    for one in outliers[:SHOWN]:
        console.line(f"  {one['distance']:.3f}  {_where(one)}: {_cut(one['text'])}")
    _show_more(console, outliers)


def _show_more(console: Console, some: Sequence[object]) -> None:
    if len(some) > SHOWN:
        console.line(f"  ... and {count(len(some) - SHOWN)} more; --json has all")


def _where(one: Mapping[str, Any]) -> str:
    return one["file"] if one["line"] is None else f"{one['file']}, line {one['line']}"


def _named(label: str | Sequence[str]) -> str:
    return label if isinstance(label, str) else f"[{', '.join(label)}]"


def _worded(one: Mapping[str, Any]) -> str:
    """Return the text of a row, behind the word that has the label, if it is one of a word."""
    return _cut(f"{one['word']!r} in: {one['text']}" if "word" in one else one["text"])


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
