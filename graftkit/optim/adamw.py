"""AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graftkit.optim.base import Optimizer, ParamGroup, can_be_fused
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay: W <- W (1 - lr decay) - lr m / (sqrt(v) + eps), with bias-corrected m and v.

    Loshchilov and Hutter 2019, 'Decoupled Weight Decay Regularization', algorithm 2; Kingma and Ba 2015, 'Adam: A Method
    for Stochastic Optimization'. This is `torch.optim.AdamW`, fused if torch supports it.

    When: there is no reason to choose another optimizer.
    Memory: 2 numbers for each trained parameter.
    """

    steps_in_backward: ClassVar[bool] = True

    beta1: float = option(0.9, "decay of the mean of gradients", at_least=0, below=1)
    beta2: float = option(0.999, "decay of the mean of squared gradients", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator", above=0)

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups or [{"params": []}],
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=can_be_fused(groups),
        )

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of two moments in the parameter's dtype and of the step count in fp32."""
        return 2 * math.prod(shape) * dtype.itemsize + torch.float32.itemsize
