"""GaLore: AdamW on a low-rank projection of the gradient of each matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftkit.errors import UserError
from graftkit.optim.base import ParamGroup
from graftkit.optim.shared.blockwise import Format
from graftkit.optim.shared.lowbit import adamw_step
from graftkit.optim.shared.moments import FULL, bias_corrections, moment_bytes, moments_in, update
from graftkit.optim.shared.partly import PartlyAdamW, decay
from graftkit.optim.shared.projecting import Projecting
from graftkit.optim.shared.projection import back, project, singular_space
from graftkit.recipe.catalogue import option

BITS = (FULL, 8)
HALF = 16
SPACE = Format(4, 256, "even")  # of a space in 4 bits


@dataclass(frozen=True)
class GaLore(Projecting):
    """AdamW on a projection of the gradient of each large matrix onto `rank` dimensions, so that moments are small.

    Zhao et al. 2024, 'GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection', algorithm 2: every
    `interval` steps, the first `rank` singular vectors of the current gradient, on its shorter side, become the space in
    which Adam works; its step, times `scale`, is projected back. Moments are not reset, and weight decay acts on the
    whole weight. As in the paper, only weights of linear layers in the body of the network are projected, if both
    sides are larger than `rank`. Everything else uses plain AdamW: embeddings, norms, biases, and parameters added by a
    method. The paper pre-trains with a rank of about a quarter of the width and a learning rate of 0.01. `scale`
    multiplies the learning rate of projected weights, so `train.lr` has to be larger than with AdamW.
    With `svd='randomized'` the singular vectors are those of Halko et al. 2011, 'Finding Structure with Randomness', with
    `power` iterations: approximate, and much less work if the matrix is far larger than the rank. If vectors cannot be computed, the space
    before is kept, and a warning names the reason. With `bits=8`, all moments are quantized as in `adamw8bit()`. The space
    has the dtype of its weight, that of an fp32 copy where weights are rounded; with `space_bits` it is stored in bf16, or in
    4 bits and blocks of 256 numbers (Zhang et al. 2024, 'Q-GaLore', section 3.3).

    When: full() or unfreeze() trains large matrices, but Adam's two numbers for each parameter do not fit into
    memory. Gradients are still stored in full for a step.
    Memory: m * rank + 2 * n * rank numbers for a projected matrix (m, n), m <= n, instead of 2 * m * n.
    """

    accumulates_in_backward: ClassVar[bool] = True

    svd: str = option("randomized", "how singular vectors are computed", choices=("randomized", "full"))
    power: int = option(2, "power iterations of a randomized decomposition", at_least=0, at_most=20)
    bits: int = option(32, "bits of each number of the moments, 32 or 8", at_least=8, at_most=32)

    space_bits: int = option(
        32,
        "bits of each number of a stored space: 32 for the dtype of the weight, 16 for bf16, or 4",
        at_least=4,
        at_most=32,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise UserError(f"galore(): bits is {self.bits}, but must be 32 or 8.")
        if self.space_bits not in (FULL, HALF, SPACE.bits):
            raise UserError(f"galore(): space_bits is {self.space_bits}, but must be 32, 16 or 4.")

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        split = self.split(groups)
        if self.bits != FULL:  # moments of the others are quantized too
            split = [group | {"own": True, "projected": group["own"]} for group in split]
        return ProjectedAdamW(split, self)

    def accumulated(self, group: ParamGroup, shape: Sequence[int]) -> int:
        return max(shape) * self.rank if self.projects(group, shape) else super().accumulated(group, shape)

    def projected_bytes(self, short: int, long: int, dtype: torch.dtype) -> int:
        """Return the bytes of the space and of two moments."""
        count = short * self.rank
        size = torch.bfloat16.itemsize if self.space_bits == HALF else dtype.itemsize
        space = SPACE.bytes(count) if self.space_bits == SPACE.bits else count * size
        return space + moment_bytes(long * self.rank, self.bits)

    def whole_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        if self.bits == FULL:
            return super().whole_bytes(shape, dtype)
        return moment_bytes(math.prod(shape), self.bits)


class ProjectedAdamW(PartlyAdamW):
    """AdamW that takes the steps of projected parameters in low rank.

    For a gradient G (m, n) with m >= n the space is V_r, the first right singular vectors of a G, (n, r), and R = G V_r;
    otherwise U_r (m, r) and R = U_r' G. Adam's step N of R becomes W <- W (1 - lr decay) - lr scale N V_r' (or U_r N).
    State of such a parameter: `step`; `space`, in 4 bits with `space_scale`; `renewed`, the step in which that was computed; and both moments of R. Steps
    are Python numbers, so that no step has to wait for the device.
    """

    def __init__(self, groups: list[ParamGroup], options: GaLore) -> None:
        super().__init__(groups, (options.beta1, options.beta2), options.eps)
        self.options = options

    @torch.no_grad()
    def project(self, parameter: Tensor, gradient: Tensor) -> Tensor | None:
        """Return the projection of a gradient, or of that of one batch of several, (m, r) or (r, n) in fp32.

        If a new space is due, it is that of this gradient, so of several batches that of the first. Projections of one step can be added up and given to `update`.
        None: the parameter is not projected.
        """
        group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
        if not group.get("projected", group["own"]):
            return None
        return project(gradient, self._space(parameter, gradient, self.state[parameter]))

    @torch.no_grad()
    def update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Take a step with a gradient, or with what `project` returned for it."""
        if not group.get("projected", True):
            adamw_step(parameter, gradient, state, group, self.options.bits)
            return
        whole = gradient.shape == parameter.shape
        space = (
            self._space(parameter, gradient, state)
            if whole
            else self._stored(parameter, state, parameter.dtype)
        )
        assert space is not None
        gradient = project(gradient, space) if whole else gradient
        step = state["step"] = state.get("step", 0) + 1
        moments = moments_in(state, gradient, self.options.bits)
        first, second = update(moments, gradient, group["betas"], self.options.bits)
        mean_size, root_size = bias_corrections(group["betas"], step)
        root = (second.sqrt() / root_size).add_(group["eps"])
        change = back(first / root, space, parameter.shape)
        decay(parameter, group)
        parameter.add_(change.to(parameter.dtype), alpha=-group["lr"] * self.options.scale / mean_size)

    def _space(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the space of a parameter, (min(m, n), r), that of this gradient if a new one is due."""
        options, taken = self.options, state.get("step", 0)
        before = self._stored(parameter, state, gradient.dtype)
        if before is not None and (taken % options.interval or state["renewed"] == taken):
            return before
        found = singular_space(gradient, options.rank, options.svd, options.power, taken, before)
        state["renewed"] = taken
        if options.space_bits != SPACE.bits:
            state["space"] = found.to(torch.bfloat16 if options.space_bits == HALF else gradient.dtype)
        else:
            if before is None:
                state["space"], state["space_scale"] = SPACE.zeros(found.numel(), found.device)
            SPACE.write(found.reshape(-1), state["space"], state["space_scale"])
        stored = self._stored(parameter, state, gradient.dtype)
        assert stored is not None
        return stored

    def _stored(self, parameter: Tensor, state: dict[str, Any], dtype: torch.dtype) -> Tensor | None:
        """Return the space in the state of a parameter, (min(m, n), r); None if there is none yet."""
        if "space" not in state:
            return None
        space: Tensor = state["space"]
        if self.options.space_bits == SPACE.bits:
            shape = min(parameter.shape), self.options.rank
            space = SPACE.read(space, state["space_scale"], math.prod(shape)).view(shape)
        return space.to(dtype)
