"""Print what `data check` found."""

from __future__ import annotations

from graftkit.report.console import Console, count
from graftkit.report.summary import statistics_lines
from graftkit.report.values import Check, Finding

SHOWN = 20  # findings of each file


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
