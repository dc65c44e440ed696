"""Lion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graftkit.optim.base import Optimizer, ParamGroup
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Lion(Optimizer):
    """Take steps of the same size in all parameters: W <- W - lr (sign(beta1 m + (1 - beta1) g) + decay W).

    Chen et al. 2023, 'Symbolic Discovery of Optimization Algorithms', algorithm 2. After the step the moment becomes
    m <- beta2 m + (1 - beta2) g.

    When: AdamW's two moments take too much memory. Use a learning rate 3 to 10 times smaller than AdamW's, and a
    weight decay as many times larger.
    Memory: 1 number for each trained parameter.
    """

    steps_in_backward: ClassVar[bool] = True

    beta1: float = option(0.9, "weight of the moment in a step", at_least=0, below=1)
    beta2: float = option(0.99, "decay of the moment", at_least=0, below=1)

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        return SignDescent(groups or [{"params": []}], {"beta1": self.beta1, "beta2": self.beta2})

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of the moment, which has the parameter's dtype."""
        return math.prod(shape) * dtype.itemsize


class SignDescent(torch.optim.Optimizer):
    """The optimizer itself. State of a parameter: `moment`, with the same shape and dtype."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["moment"] = torch.zeros_like(parameter)
                direction = state["moment"].lerp(parameter.grad, 1 - group["beta1"]).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])
                state["moment"].lerp_(parameter.grad, 1 - group["beta2"])
        return loss
