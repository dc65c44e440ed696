"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math


def factor(step: int, total: int, warmup: float, schedule: str, decay: float = 0.2) -> float:
    """Return the factor on the learning rate in `step` (0-based) of `total`.

    Linear warm-up over the first `warmup` (share of all steps), never zero; then 'linear' or 'cosine' decay
    towards zero, 'constant', or 'wsd': warm-up, stable, decay. There the rate is constant until the last `decay` (share
    of all steps), N steps in which it falls as 1 - sqrt(n / N): Hägele et al. 2024, 'Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations', section 3, who find this form better than a linear one.
    """
    warm = warmup * total
    if step < warm:
        return min(1.0, (step + 1) / (warm + 1))
    left = (total - step) / max(1.0, total - warm)
    if schedule == "wsd":
        start = decay_start(total, decay)
        return 1 - math.sqrt(max(0, step - start) / max(1, total - start))
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return left


def decay_start(total: int, decay: float) -> int:
    """Return the first step (0-based) of the decay of 'wsd', which is also the number of steps before it."""
    return total - max(1, round(decay * total)) if total else 0
