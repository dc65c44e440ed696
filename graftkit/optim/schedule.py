"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math


def factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Return the factor on the learning rate in `step` (0-based) of `total`.

    Linear warm-up over the first `warmup` (share of all steps), never zero; then 'linear' or 'cosine' decay
    towards zero, or 'constant'.
    """
    warm = warmup * total
    if step < warm:
        return min(1.0, (step + 1) / (warm + 1))
    left = (total - step) / max(1.0, total - warm)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return left
