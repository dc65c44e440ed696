"""From the runs of several methods to a ranking: means, paired differences, and what is best for its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graftkit.insight.paired import Group, draws_rows, interval, resampled
from graftkit.report.comparison import EQUAL
from graftkit.runs.best import Best

COSTS = ("seconds", "peak_memory_bytes", "trained_parameters")


def ranked(rows: Sequence[dict[str, Any]], groups: Sequence[Group], choice: Best) -> dict[str, Any]:
    """Return the rows with `mean`, `interval` and the `difference` to the next, the best first and in order of `few`; all
    `differences`; the names on the Pareto front; and `notes`. The last two and the differences are of the most rows."""
    made: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    notes: list[str] = []
    sizes = list(dict.fromkeys(row.get("few") for row in rows))
    for size in sizes:
        places = [i for i, row in enumerate(rows) if row.get("few") == size]
        sign = -1 if choice.direction == "min" else 1
        places.sort(key=lambda i: -sign * groups[i].mean)
        chosen = [groups[i] for i in places]
        drawn = resampled(chosen)
        tell = [draws_rows(chosen) or len(group.values) > 1 for group in chosen]
        for place, i in enumerate(places):
            row = rows[i] | {
                "mean": groups[i].mean,
                "interval": interval(drawn[place]) if tell[place] else None,
            }
            if place + 1 < len(places):
                after = place + 1
                row["next"] = _difference(rows, places, groups, drawn, sign, place, after, tell)
            made.append(row)
        differences = [
            _difference(rows, places, groups, drawn, sign, one, other, tell)
            for one in range(len(places)) for other in range(one + 1, len(places))
        ]  # fmt: skip
        if not draws_rows(chosen):
            notes = [f"{choice.figure} is no mean over rows, so the intervals are over the seeds alone."]
    edge = [row["method"] for row in made if row.get("at_the_edge") and row.get("few") == sizes[-1]]
    if edge:
        notes.append(
            f"The best learning rate is the lowest or highest that was tried: {', '.join(edge)}. A larger --search goes on "
            "from there."
        )
    last = [row for row in made if row.get("few") == sizes[-1]] if sizes else []
    return {
        "rows": made, "differences": differences, "pareto": pareto(last, choice.direction), "notes": notes,
    }  # fmt: skip


def _difference(
    rows: Sequence[dict[str, Any]], places: Sequence[int], groups: Sequence[Group], drawn: np.ndarray, sign: int, one: int,
    other: int, tell: Sequence[bool],
) -> dict[str, Any]:  # fmt: skip
    """Return how much better one method is than another, with its interval over the same resamples."""
    by = sign * (groups[places[one]].mean - groups[places[other]].mean)
    ends = interval(sign * (drawn[one] - drawn[other])) if tell[one] and tell[other] else None
    return {
        "method": rows[places[one]]["method"],
        "than": rows[places[other]]["method"],
        "by": by,
        "interval": ends,
    }


def pareto(rows: Sequence[dict[str, Any]], direction: str) -> list[str]:
    """Return the methods that no other beats: none is at least as good at no higher cost, and better in one of these."""
    sign = -1 if direction == "min" else 1
    return [
        row["method"]
        for row in rows
        if not any(_beats(other, row, sign) for other in rows if other is not row)
    ]


def _beats(one: dict[str, Any], other: dict[str, Any], sign: int) -> bool:
    gain = sign * (one["mean"] - other["mean"])
    if gain < 0 or any(one[cost] > EQUAL * other[cost] for cost in COSTS):
        return False
    return gain > 0 or any(EQUAL * one[cost] < other[cost] for cost in COSTS)
