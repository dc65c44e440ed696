"""The base class of optimizers: values that make a `torch.optim.Optimizer` and know the size of its state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graftkit.recipe.catalogue import check_values, entry_name
from graftkit.recipe.expressions import as_expression, build, parse_one

# a dict with 'params', 'lr', 'weight_decay' and 'hidden', and 'blocks': for each parameter the number of the backbone's block
# that it lies in, or None. Without 'hidden', all parameters count as hidden; without 'blocks', they lie in none.
ParamGroup = dict[str, Any]


@dataclass(frozen=True)
class Optimizer:
    """Base of all optimizers. Subclasses are frozen dataclasses whose fields are declared with `option`.

    Learning rate and weight decay are not options: they come with each group, from the labels of the
    parameters, `train.lr` and `train.weight_decay`, because they apply to any optimizer.
    """

    # the step of a parameter needs only its own gradient, so it can be taken as soon as the backward pass computed that
    steps_in_backward: ClassVar[bool] = False
    # within the backward pass, gradients of several batches can be added up: the optimizer projects them to something small
    accumulates_in_backward: ClassVar[bool] = False
    # every step moves all parameters that have a gradient
    moves_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def name(self) -> str:
        """The name in recipes, which is that of the file."""
        return entry_name(type(self).__module__)

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """Return the optimizer of these groups of parameters.

        Its state for a parameter must be tensors or numbers in `state`, and its state for all parameters numbers in a
        group, so that checkpoints include both.
        """
        raise NotImplementedError

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of all tensors in the state of a parameter of this shape and dtype, after its first step."""
        raise NotImplementedError

    def group_bytes(self, group: ParamGroup, dtype: torch.dtype | None = None) -> int:
        """Return the bytes of state for the parameters of a group. `dtype`: the dtype they will be cast to, if any.

        Override it if the state depends on `hidden`, which `state_bytes` does not know.
        """
        return sum(self.state_bytes(p.shape, dtype or p.dtype) for p in group["params"])

    def total_bytes(self, groups: Iterable[ParamGroup], dtype: torch.dtype | None = None) -> int:
        """Return the most bytes of state that exist at any time.

        Override it if not all parameters have state at the same time.
        """
        return sum(self.group_bytes(group, dtype) for group in groups)

    def accumulated(self, group: ParamGroup, shape: Sequence[int]) -> int:
        """Return the numbers kept of the gradient of a parameter of a group between the batches of a step that is taken
        within the backward pass."""
        return math.prod(shape)

    def check(self, groups: Iterable[ParamGroup]) -> None:
        """Raise `UserError` if the optimizer makes no sense for these parameters."""

    def __str__(self) -> str:
        return as_expression(self)


def as_optimizer(optimizer: Optimizer | str) -> Optimizer:
    """Return the optimizer that an expression such as `galore(rank=128)` describes; an `Optimizer` is returned unchanged."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    return build((parse_one(optimizer, "optimizer"),), "optimizer")[0]


def can_be_fused(groups: Iterable[ParamGroup]) -> bool:
    """Return whether torch has fused kernels for the devices of all parameters."""
    return {p.device.type for group in groups for p in group["params"]} <= {"cpu", "cuda"}
