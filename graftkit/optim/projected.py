"""AdamW, for chosen matrices in a low-rank space of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ProjectedAdamW(torch.optim.AdamW):
    """AdamW that takes the steps of groups with a `projection`, a dict of rank, interval and scale, in low rank.

    Zhao et al. 2024 (GaLore), algorithm 2. For a gradient G (m, n) with m >= n the space is V_r, the first right singular
    vectors of a G, (n, r), and R = G V_r; otherwise U_r (m, r) and R = U_r' G. Adam's step N of R becomes
    W <- W (1 - lr decay) - lr scale N V_r' (or U_r N).
    State of such a parameter: step, exp_avg and exp_avg_sq of R's shape, and `space`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._step_supports_amp_scaling = False  # gradients are to be unscaled before they are projected

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = self.param_groups
        for group in every:
            if group.get("projection") is not None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _step(parameter, self.state[parameter], group)
        self.param_groups = [group for group in every if group.get("projection") is None]
        try:
            super().step()
        finally:
            self.param_groups = every
        return loss


def _step(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    assert parameter.grad is not None
    projection = group["projection"]
    gradient = parameter.grad.float()
    tall = gradient.shape[0] >= gradient.shape[1]
    taken = int(state.get("step", 0))
    if taken % projection["interval"] == 0:
        state["space"] = space(gradient, projection["rank"])
    low = gradient @ state["space"] if tall else state["space"].T @ gradient
    if taken == 0:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
    state["step"] += 1
    first, second = group["betas"]
    state["exp_avg"].lerp_(low, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(low, low, value=1 - second)
    count = taken + 1
    deviation = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
    change = state["exp_avg"] / (1 - first**count) / deviation
    whole = change @ state["space"].T if tall else state["space"] @ change
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(whole.to(parameter.dtype), alpha=-group["lr"] * projection["scale"])


def space(gradient: Tensor, rank: int) -> Tensor:
    """The first singular vectors of the shorter side of a gradient (m, n): (min(m, n), rank), fp32."""
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    tall = gradient.shape[0] >= gradient.shape[1]
    return (right[:rank].T if tall else left[:, :rank]).contiguous()
