"""APOLLO: gradient descent with a rate for each channel, taken from Adam in a random low-rank space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftkit.optim.base import ParamGroup
from graftkit.optim.shared.moments import FULL, bias_corrections, moment_bytes, moments_in, update
from graftkit.optim.shared.partly import PartlyAdamW, decay
from graftkit.optim.shared.projecting import Projecting, column_norms, limit_growth
from graftkit.optim.shared.projection import project, random_space
from graftkit.recipe.catalogue import option

MINI_SCALE = math.sqrt(128)


@dataclass(frozen=True)
class Apollo(Projecting):
    """Scale each channel of the gradient as Adam would, which is estimated in a small random space.

    Zhu et al. 2024, 'APOLLO: SGD-like Memory, AdamW-level Performance', algorithm 1: R = P G with a random P of `rank` rows,
    Adam's step N of R, and s_j = ||N_j|| / ||R_j|| for each channel j of the longer side; then W <- W - lr (scale G
    diag(s) + decay W). The norm of the scaled gradient may grow by 1% from step to step. P is drawn anew from a seed in
    each step and changes every `interval` steps, so it takes no memory, and there is no singular value decomposition.
    With `mini=True`, the rank is 1, one s is used for the whole matrix, and `scale` is multiplied by the root of 128.
    Matrices of the same shape share P. The paper uses a rank of a quarter of the width and a learning rate of 0.01.
    Which weights are projected is as in `galore()`.

    When: as for `galore()`, with less memory at the same rank and faster steps.
    Memory: 2 * n * rank + 1 numbers for a projected matrix (m, n), m <= n, and the seed; 2 * n + 1 with mini.
    """

    scale: float = option(1.0, "factor on the steps of projected matrices", above=0)
    eps: float = option(1e-6, "added to the root of the second moment, without bias correction", above=0)
    mini: bool = option(False, "rank 1, and one factor for each matrix")
    seed: int = option(0, "seed of the random spaces", at_least=0)

    @property
    def dimensions(self) -> int:
        return 1 if self.mini else self.rank

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        return ScaledDescent(self.split(groups), self)

    def projected_bytes(self, short: int, long: int, dtype: torch.dtype) -> int:
        """Return the bytes of two moments and a norm in fp32."""
        return moment_bytes(long * self.dimensions, FULL) + torch.float32.itemsize


class ScaledDescent(PartlyAdamW):
    """AdamW that takes the steps of projected parameters as APOLLO does.

    State of such a parameter: `step`, both moments of the projected gradient, and `norm`, that of the scaled gradient in
    the step before.
    """

    def __init__(self, groups: list[ParamGroup], options: Apollo) -> None:
        super().__init__(groups, (options.beta1, options.beta2), options.eps)
        self.options = options

    def update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        options, taken = self.options, state.get("step", 0)
        state["step"] = taken + 1
        gradient = gradient.float()
        space = random_space(gradient, options.dimensions, _seed(options.seed, taken // options.interval))
        low = project(gradient, space)
        first, second = update(moments_in(state, low, FULL), low, group["betas"], FULL)
        step = first / second.sqrt().add_(group["eps"])
        norm = torch.linalg.vector_norm if options.mini else lambda x: column_norms(x, parameter.shape)
        change = limit_growth(gradient * (norm(step) / (norm(low) + 1e-8)), state, "norm")
        mean_size, root_size = bias_corrections(group["betas"], taken + 1)
        scale = options.scale * (MINI_SCALE if options.mini else 1)
        decay(parameter, group)
        parameter.add_(change.to(parameter.dtype), alpha=-group["lr"] * scale * root_size / mean_size)


def _seed(seed: int, renewal: int) -> int:
    return (seed * 1_000_003 + renewal) % 2**63
