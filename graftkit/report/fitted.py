"""Print what `fit` found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftkit.report.console import Console, count

NAMES = {"most_frequent": "most frequent answer", "bag_of_words": "bag of words"}


def show_fit(console: Console, found: Mapping[str, Any]) -> None:
    """Print a table of models, best first, with the baselines below, and what speaks against each model."""
    models, baselines = found["models"], found["baselines"]
    metric = models[0]["probe"]["metric"]
    of = "" if found["rows"] == found["of"] else f" of {count(found['of'])}"
    console.heading(f"Fit: {metric} in cross-validation on {count(found['rows'])}{of} rows")
    rows = [
        [
            one["model"], _with_interval(one["probe"]), f"{one['knn']['value']:.3f}", f"{one['logme']:.3f}",
            _behind(one["behind"]), f"{one['seconds']:.1f}",
        ] for one in models
    ]  # fmt: skip
    rows += [[NAMES[name], _with_interval(one), "", "", "", ""] for name, one in baselines.items()]
    console.table(["model", "linear probe", "nearest rows", "LogME", "behind the first", "seconds"], rows)
    for one in models:
        for warning in one["warnings"]:
            console.line(f"\nwarning: {one['model']}: {warning}")


def _with_interval(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['value']:.3f} ({low:.3f} to {high:.3f})"


def _behind(interval: Any) -> str:
    if interval is None:
        return ""
    low, high = -interval[1], -interval[0]
    return f"{low:.3f} to {high:.3f}" + (", by chance perhaps" if low <= 0 else "")
