"""Fira: low-rank Adam, with the rest of the gradient scaled as Adam scales the projected part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftkit.optim.base import ParamGroup
from graftkit.optim.shared.moments import FULL, bias_corrections, moment_bytes, moments_in, update
from graftkit.optim.shared.partly import PartlyAdamW, decay
from graftkit.optim.shared.projecting import Projecting, column_norms, limit_growth
from graftkit.optim.shared.projection import back, project, singular_space
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Fira(Projecting):
    """GaLore, plus the part of the gradient outside of the space, so that updates have full rank.

    Chen et al. 2024, 'Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?', algorithm 1: with
    N the step that Adam takes for the projected gradient R, each column of G - P R is multiplied by ||N|| / ||R|| of that
    column, and the result is added to `scale` P N. Its norm may grow by 1% from step to step. The space and which weights
    are projected are as in `galore()`, and so are the paper's settings: a rank of a quarter of the width, a
    learning rate of 0.01. The authors' code multiplies the projection by `scale` before it is subtracted from G; here
    it is not, as in the paper. With scale=1 both are the same.

    When: as for `galore()`, which learns less per step at small ranks.
    Memory: m * rank + 2 * n * rank + 1 numbers for a projected matrix (m, n), m <= n, instead of 2 * m * n.
    """

    eps: float = option(1e-6, "added to the root of the second moment, without bias correction", above=0)
    svd: str = option("randomized", "how singular vectors are computed", choices=("randomized", "full"))
    power: int = option(2, "power iterations of a randomized decomposition", at_least=0, at_most=20)

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        return FullRankAdamW(self.split(groups), self)

    def projected_bytes(self, short: int, long: int, dtype: torch.dtype) -> int:
        """Return the bytes of the space in the parameter's dtype, of two moments and a norm in fp32."""
        norm = torch.float32.itemsize
        return short * self.rank * dtype.itemsize + moment_bytes(long * self.rank, FULL) + norm


class FullRankAdamW(PartlyAdamW):
    """AdamW that takes the steps of projected parameters as Fira does.

    State of such a parameter: `step`; `space`, new every `interval` steps; both moments of the projected gradient; and
    `norm`, that of the residual in the step before.
    """

    def __init__(self, groups: list[ParamGroup], options: Fira) -> None:
        super().__init__(groups, (options.beta1, options.beta2), options.eps)
        self.options = options

    def update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        options, taken = self.options, state.get("step", 0)
        if taken % options.interval == 0:
            before = state.get("space")
            found = singular_space(gradient, options.rank, options.svd, options.power, taken, before)
            state["space"] = found.to(parameter.dtype)
        state["step"] = taken + 1
        low = project(gradient, state["space"])
        first, second = update(moments_in(state, low, FULL), low, group["betas"], FULL)
        step = first / second.sqrt().add_(group["eps"])
        factor = column_norms(step, parameter.shape) / (column_norms(low, parameter.shape) + 1e-8)
        residual = gradient.float() - back(low, state["space"], parameter.shape)
        residual = limit_growth(residual.mul_(factor), state, "norm")
        change = back(step, state["space"], parameter.shape).float().mul_(options.scale).add_(residual)
        mean_size, root_size = bias_corrections(group["betas"], taken + 1)
        decay(parameter, group)
        parameter.add_(change.to(parameter.dtype), alpha=-group["lr"] * root_size / mean_size)
