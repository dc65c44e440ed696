"""AdamW with quantized moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftkit.optim.base import Optimizer, ParamGroup
from graftkit.optim.shared.moments import (
    bias_corrections,
    chunks,
    is_quantized,
    moment_bytes,
    moments_in,
    update,
)
from graftkit.optim.shared.partly import PartlyAdamW, split
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class LowBitAdamW(Optimizer):
    """Base of the optimizers whose moments have `BITS` bits each."""

    steps_in_backward: ClassVar[bool] = True
    BITS: ClassVar[int]

    beta1: float = option(0.9, "decay of the mean of gradients", at_least=0, below=1)
    beta2: float = option(0.999, "decay of the mean of squared gradients", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator", above=0)

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        return QuantizedAdamW(groups, (self.beta1, self.beta2), self.eps, self.BITS)

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of indices and scales, or of moments in fp32 for a small tensor, whatever the dtype."""
        return moment_bytes(math.prod(shape), self.BITS)


class QuantizedAdamW(PartlyAdamW):
    """AdamW whose moments are stored in 8 or 4 bits, except for small tensors, where they are fp32.

    A step computes in fp32, for a limited number of elements at a time: moments are expanded, updated, used, and quantized
    again. State of a parameter: `step`; exp_avg and exp_avg_sq, and the scales of both if quantized.
    """

    def __init__(self, groups: list[ParamGroup], betas: tuple[float, float], eps: float, bits: int) -> None:
        super().__init__(split(groups, lambda group, parameter: True), betas, eps)
        self.bits = bits

    def update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        adamw_step(parameter, gradient, state, group, self.bits)


def adamw_step(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], bits: int
) -> None:
    """Take a step of AdamW with moments of `bits` bits each. `group`: lr, weight_decay, betas and eps."""
    moments = moments_in(state, parameter, bits)
    step = state["step"] = state.get("step", 0) + 1
    weights, gradients = parameter.detach().reshape(-1), gradient.reshape(-1)
    if is_quantized(len(weights), bits):
        for part, places in chunks(len(weights), bits, weights.device):
            stored = tuple(tensor[place] for tensor, place in zip(moments, places))
            _move(weights[part], gradients[part], stored, step, group, bits)
    else:
        flat = tuple(tensor.view(-1) for tensor in moments)
        _move(weights, gradients, flat, step, group, bits)
    if not parameter.is_contiguous():  # `weights` is a copy then
        parameter.copy_(weights.view_as(parameter))


def _move(
    weights: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, ...],
    step: int,
    group: dict[str, Any],
    bits: int,
) -> None:
    first, second = update(moments, gradient.float(), group["betas"], bits)
    mean_size, root_size = bias_corrections(group["betas"], step)
    root = (second.sqrt() / root_size).add_(group["eps"])
    moved = weights.float() if weights.dtype != torch.float32 else weights
    moved.mul_(1 - group["lr"] * group["weight_decay"])
    moved.addcdiv_(first, root, value=-group["lr"] / mean_size)
    if moved is not weights:
        weights.copy_(moved)
