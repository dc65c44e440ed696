"""What earlier runs on this machine were predicted to take, and took: the intervals of the next plan.

Lines of JSON in the cache folder, the newest last; at most `MOST` are kept. A run adds one when it ends.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.files import special, write_text
from graftkit.recipe.environment import cache_folder

FILE = "predictions.jsonl"
MOST = 200
FIGURES = ("peak_memory_bytes", "seconds")
LAST = 50  # runs that count
LEAST = 8  # runs from which their errors are the interval
DEFAULT = {"peak_memory_bytes": 0.15, "seconds": 0.4}  # relative, until there are so many
TRIAL, COUNT = "trial", "count"  # how a run was foreseen
COVERED = 0.9  # of the runs before lie within their interval


@dataclass(frozen=True)
class History:
    """The runs of one machine, oldest first. `ratios`: measured by predicted of each figure, of runs that were foreseen in the
    same way; `all`: of any."""

    ratios: dict[str, list[float]]
    all: dict[str, list[float]]

    def interval(self, figure: str, value: float) -> list[float]:
        """Return the least and most that a figure is expected to be: the range of nine runs in ten before, or a default."""
        known = self.ratios.get(figure, [])
        if len(known) < LEAST:
            return [value / (1 + DEFAULT[figure]), value * (1 + DEFAULT[figure])]
        low, high = np.quantile(known, [(1 - COVERED) / 2, (1 + COVERED) / 2])
        return [value * min(1.0, float(low)), value * max(1.0, float(high))]

    def errors(self) -> dict[str, Any] | None:
        """Return how right the last runs were: their number, and for each figure the median and the largest relative error.
        None without a run."""
        found = {
            figure: {
                "runs": len(ratios), "median": round(float(np.median(np.abs(np.array(ratios) - 1))), 4),
                "largest": round(float(np.abs(np.array(ratios) - 1).max()), 4),
            }
            for figure, ratios in self.all.items() if ratios
        }  # fmt: skip
        return found or None


def read(machine: str, by: str, path: Path | None = None) -> History:
    """Return what is known of a machine. `by`: how the run to come is foreseen, whose errors tell nothing of the other way."""
    lines = [line for line in _lines(path or cache_folder() / FILE) if line.get("machine") == machine]

    def ratios(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
        found = {figure: [_ratio(line, figure) for line in lines] for figure in FIGURES}
        return {figure: [one for one in known if one is not None][-LAST:] for figure, known in found.items()}

    return History(ratios([line for line in lines if line.get("by") == by]), ratios(lines))


def add(
    machine: str, by: str, predicted: dict[str, Any], measured: dict[str, Any], path: Path | None = None
) -> None:
    """Add a run. Without a cache folder nothing is kept."""
    path = path or cache_folder() / FILE
    line = {"machine": machine, "by": by, "predicted": predicted, "measured": measured}
    with suppress(Exception):
        lines = [*_lines(path), line][-MOST:]
        write_text(path, "".join(f"{json.dumps(one)}\n" for one in lines))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = "" if special(path) else path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    found = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def _ratio(line: dict[str, Any], figure: str) -> float | None:
    try:
        ratio = line["measured"][figure] / line["predicted"][figure]
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    return float(ratio) if math.isfinite(ratio) and 0 < ratio < 1e3 else None
