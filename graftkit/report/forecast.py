"""Print what a run will take before its first step. No torch here: everything is plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftkit.report.console import Console, size

NAMES = {
    "products": "matrix products", "attention": "attention", "convolution": "convolutions", "elementwise": "element-wise",
    "host": "Python and calls",
}  # fmt: skip


def show_forecast(console: Console, found: Mapping[str, Any]) -> None:
    """Print memory, seconds and where the time goes. `found`: as in `graftkit plan --json`."""
    console.heading("Forecast")
    console.pairs(list(_lines(found)))


def _lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    memory, seconds = found["memory_bytes"], found["seconds"]
    low, high = memory["interval"]
    parts = [
        f"{name} {size(memory[name])}"
        for name in ("weights", "gradients", "optimizer", "activations", "other") if memory[name]
    ]  # fmt: skip
    lines = [
        (
            "memory",
            f"about {size(memory['peak'])} at the peak ({size(low)} to {size(high)}): {', '.join(parts)}",
        )
    ]
    low, high = seconds["interval"]
    before = (
        f", {span(seconds['filling'])} of them for frozen layers before the first step"
        if seconds["filling"] > 1
        else ""
    )
    lines.append(
        (
            "time",
            f"about {span(seconds['total'])} ({span(low)} to {span(high)}), {span(seconds['epoch'])} an epoch{before}",
        )
    )
    shares = sorted(found["time"].items(), key=lambda one: -one[1])
    if shares:
        lines.append(
            ("of a step", ", ".join(f"{NAMES[name]} {share:.0%}" for name, share in shares if share >= 0.01))
        )
    lines += [("advice", text) for text in found["advice"]]
    if found["plan_error"]:
        lines.append(("earlier runs", error_line(found["plan_error"])))
    if found["forecast_note"]:
        lines.append(("note", found["forecast_note"]))
    return lines


def error_line(errors: Mapping[str, Any]) -> str:
    """Say how right the plans of earlier runs were."""
    names = {"peak_memory_bytes": "memory", "seconds": "time"}
    parts = [
        f"{names[figure]} by {one['median']:.0%} (at most {one['largest']:.0%})"
        for figure, one in errors.items()
    ]
    runs = max(one["runs"] for one in errors.values())
    return f"on this machine, the plans of the last {runs} were wrong in {' and '.join(parts)}, in the median"


def span(seconds: float) -> str:
    """Format seconds: '0.4 s', '12 s', '5 min', '3.2 h', '12 days'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, name in ((60.0, "s"), (3600.0, "min"), (86_400.0, "h")):
        if seconds < 1.5 * unit:
            value = seconds / {"s": 1, "min": 60, "h": 3600}[name]
            return f"{value:.0f} {name}" if name == "s" or value >= 10 else f"{value:.1f} {name}"
    return f"{seconds / 86_400:.1f} days"
