"""GaLore: AdamW on a low-rank projection of the gradient of each matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftkit.errors import UserError
from graftkit.optim.base import Optimizer, ParamGroup, can_be_fused
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class GaLore(Optimizer):
    """AdamW on a projection of the gradient of each large matrix onto `rank` dimensions, so that moments are small.

    Zhao et al. 2024, 'GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection', algorithm 2: every
    `interval` steps, the first `rank` singular vectors of the current gradient, on its shorter side, become the space in
    which Adam works; its step, times `scale`, is projected back. Moments are not reset, and weight decay acts on the
    whole weight. As in the paper, only weights of linear layers in the body of the network are projected, if both
    sides are larger than `rank`. Everything else uses plain AdamW: embeddings, norms, biases, and parameters added by a
    method. The paper pre-trains with a rank of about a quarter of the width and a learning rate of 0.01. `scale`
    multiplies the learning rate of projected weights, so `train.lr` has to be larger than with AdamW.

    When: full() or unfreeze() trains large matrices, but Adam's two numbers for each parameter do not fit into
    memory. Gradients are still stored in full for a step.
    Memory: m * rank + 2 * n * rank numbers for a projected matrix (m, n), m <= n, instead of 2 * m * n.
    """

    steps_in_backward: ClassVar[bool] = True

    rank: int = option(128, "dimensions of the space in which Adam works", at_least=1)
    interval: int = option(200, "steps between updates of the space", at_least=1)
    scale: float = option(0.25, "factor on the steps of projected matrices", above=0)
    beta1: float = option(0.9, "decay of the mean of gradients", at_least=0, below=1)
    beta2: float = option(0.999, "decay of the mean of squared gradients", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator", above=0)

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        projection = asdict(Projection(self.rank, self.interval, self.scale))
        split = []
        for group in groups:
            low = {id(p) for p in group["params"] if self.projects(group, p.shape)}
            whole = [p for p in group["params"] if id(p) not in low]
            if low:
                chosen = [p for p in group["params"] if id(p) in low]
                split.append(group | {"params": chosen, "projection": projection})
            if whole:
                split.append(group | {"params": whole})
        return ProjectedAdamW(
            split or [{"params": []}],
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=can_be_fused(groups),
        )

    def projects(self, group: ParamGroup, shape: Sequence[int]) -> bool:
        """Return whether the gradient of a parameter of a group is projected."""
        return group.get("hidden", True) and len(shape) == 2 and min(shape) > self.rank

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of the space and two moments in fp32, for a projected parameter of any dtype.

        For others, those of two moments in the parameter's dtype and of the step count in fp32.
        """
        if not self.projects({}, shape):
            return _whole_bytes(shape, dtype)
        short, long = sorted(shape)
        return (short + 2 * long) * self.rank * torch.float32.itemsize

    def group_bytes(self, group: ParamGroup, dtype: torch.dtype | None = None) -> int:
        if group.get("hidden", True):
            return super().group_bytes(group, dtype)
        return sum(_whole_bytes(p.shape, dtype or p.dtype) for p in group["params"])

    def check(self, groups: Iterable[ParamGroup]) -> None:
        if not any(self.projects(group, p.shape) for group in groups for p in group["params"]):
            raise UserError(
                f"train.optimizer={self}: no trained linear layer of the backbone has more than {self.rank} rows "
                "and columns, so nothing would be projected; lower rank, train more of the backbone, or leave "
                "train.optimizer out."
            )


def _whole_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return 2 * math.prod(shape) * dtype.itemsize + torch.float32.itemsize


@dataclass(frozen=True)
class Projection:
    """Adam works in a space of `rank` dimensions, updated every `interval` steps; `scale`: factor on its steps."""

    rank: int
    interval: int
    scale: float


class ProjectedAdamW(torch.optim.AdamW):
    """AdamW that takes the steps of groups with a `projection`, a dict of rank, interval and scale, in low rank.

    For a gradient G (m, n) with m >= n the space is V_r, the first right singular vectors of a G, (n, r), and R = G V_r;
    otherwise U_r (m, r) and R = U_r' G. Adam's step N of R becomes W <- W (1 - lr decay) - lr scale N V_r' (or U_r N).
    State of such a parameter: `step`, exp_avg and exp_avg_sq of R's shape, and `space`. The step is a Python
    number, so that no step has to wait for the device.
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
    taken = state.get("step", 0)
    if taken % projection["interval"] == 0:
        state["space"] = space(gradient, projection["rank"])
    low = gradient @ state["space"] if tall else state["space"].T @ gradient
    if taken == 0:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
    count = state["step"] = taken + 1
    first, second = group["betas"]
    state["exp_avg"].lerp_(low, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(low, low, value=1 - second)
    root = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
    change = state["exp_avg"] / (1 - first**count) / root
    whole = change @ state["space"].T if tall else state["space"] @ change
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(whole.to(parameter.dtype), alpha=-group["lr"] * projection["scale"])


def space(gradient: Tensor, rank: int) -> Tensor:
    """Return the first singular vectors of the shorter side of a gradient (m, n): (min(m, n), rank), fp32."""
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    tall = gradient.shape[0] >= gradient.shape[1]
    return (right[:rank].T if tall else left[:, :rank]).contiguous()
