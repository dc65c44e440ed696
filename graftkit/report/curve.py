"""The curve of a learning-rate range test as a short table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftkit.report.console import Console

LINES = 12
WIDTH = 30  # characters of the longest bar


def show_curve(console: Console, curve: Mapping[str, Any]) -> None:
    """Print the smoothed loss at some of the rates with bars, and the chosen rate. `curve`: the content of lr-find.json."""
    rates, losses = curve["rates"], curve["smoothed"]
    console.heading("Learning rate")
    low, high = min(losses), max(losses[0], min(losses))
    rows = []
    for i in range(0, len(rates), max(1, round(len(rates) / LINES))):
        height = (losses[i] - low) / (high - low) if high > low else 0.0
        rows.append([f"{rates[i]:.1e}", f"{losses[i]:.4f}", "#" * round(WIDTH * min(1.0, height))])
    console.table(["rate", "loss", ""], rows)
    console.line(
        f"  chosen: {curve['chosen']:g}, the steepest descent of the loss, or a tenth of the rate of the lowest if that is less"
        f"{'; the loss diverged at the end' if curve['diverged'] else ''}"
    )
