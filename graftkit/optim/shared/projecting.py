"""What optimizers with a projection of the gradient have in common: their options, which weights, and how many bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftkit.errors import UserError
from graftkit.optim.base import Optimizer, ParamGroup
from graftkit.optim.shared.partly import split, whole_bytes
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Projecting(Optimizer):
    """Base of optimizers whose state for a large matrix lies in `rank` dimensions of its shorter side.

    Only weights of linear layers in the body of the network are projected, if both sides are larger than the rank.
    Everything else uses plain AdamW: embeddings, norms, biases, and parameters added by a method.
    """

    steps_in_backward: ClassVar[bool] = True

    rank: int = option(128, "dimensions of the space in which Adam works", at_least=1)
    interval: int = option(200, "steps between updates of the space", at_least=1)
    scale: float = option(0.25, "factor on the steps of projected matrices", above=0)
    beta1: float = option(0.9, "decay of the mean of gradients", at_least=0, below=1)
    beta2: float = option(0.999, "decay of the mean of squared gradients", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator", above=0)

    @property
    def dimensions(self) -> int:
        """The rank that is used."""
        return self.rank

    def projects(self, group: ParamGroup, shape: Sequence[int]) -> bool:
        """Return whether the gradient of a parameter of a group is projected."""
        return group.get("hidden", True) and len(shape) == 2 and min(shape) > self.dimensions

    def split(self, groups: list[ParamGroup]) -> list[ParamGroup]:
        """Return groups whose parameters are either all projected, and marked `own`, or not."""
        return split(groups, lambda group, parameter: self.projects(group, parameter.shape))

    def projected_bytes(self, short: int, long: int, dtype: torch.dtype) -> int:
        """Return the bytes of state for a projected matrix with these sides."""
        raise NotImplementedError

    def whole_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of state for a parameter that is not projected."""
        return whole_bytes(math.prod(shape), dtype)

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of state of a hidden parameter, which is projected if it is a matrix larger than the rank."""
        if not self.projects({}, shape):
            return self.whole_bytes(shape, dtype)
        return self.projected_bytes(min(shape), max(shape), dtype)

    def group_bytes(self, group: ParamGroup, dtype: torch.dtype | None = None) -> int:
        if group.get("hidden", True):
            return super().group_bytes(group, dtype)
        return sum(self.whole_bytes(p.shape, dtype or p.dtype) for p in group["params"])

    def check(self, groups: Iterable[ParamGroup]) -> None:
        if not any(self.projects(group, p.shape) for group in groups for p in group["params"]):
            raise UserError(
                f"train.optimizer={self}: no trained linear layer of the backbone has more than {self.dimensions} rows "
                "and columns, so nothing would be projected; lower rank, train more of the backbone, or leave "
                "train.optimizer out."
            )


def limit_growth(change: Tensor, state: dict[str, Any], key: str, most: float = 1.01) -> Tensor:
    """Return a change whose norm is at most `most` times that of the step before, stored in state[key] as one number.

    Chen et al. 2024, 'Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?', equation 9.
    """
    norm = torch.linalg.vector_norm(change)
    if key in state:
        factor = (norm / (state[key] + 1e-8)).clamp(min=most) / most
        change, norm = change / factor, norm / factor
    state[key] = norm
    return change


def column_norms(low: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the norms along the low-rank side of coordinates of a matrix (m, n): (m, 1) or (1, n)."""
    return torch.linalg.vector_norm(low, dim=1 if shape[0] >= shape[1] else 0, keepdim=True)
