"""What an optimizer is: a value that makes a `torch.optim.Optimizer`, and knows what that keeps for each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graftkit.recipe.catalogue import check_values, entry_name
from graftkit.recipe.expressions import as_expression, build, parse_one

# one of the dicts of `param_groups`: 'params', 'lr', 'weight_decay' and 'hidden'; without the latter all count as hidden
ParamGroup = dict[str, Any]


@dataclass(frozen=True)
class Optimizer:
    """Base of all optimizers. Subclasses are frozen dataclasses whose fields are declared with `option`.

    Learning rates and weight decay are not among their options: these come with each group, from the labels of the
    parameters, `train.lr` and `train.weight_decay`, because they hold for any optimizer.
    """

    # the step of a parameter needs no gradient but its own, so it could be taken as soon as the backward pass has it
    steps_in_backward: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def name(self) -> str:
        """The name in recipes: that of the file."""
        return entry_name(type(self).__module__)

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """Return the optimizer of these groups of parameters.

        Whatever it keeps for a parameter from step to step is a tensor or a number in its `state`, and whatever it
        keeps for all of them a number in a group, so that checkpoints hold it.
        """
        raise NotImplementedError

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of all tensors in the state of a parameter of this shape and type, once it took a step."""
        raise NotImplementedError

    def group_bytes(self, group: ParamGroup, dtype: torch.dtype | None = None) -> int:
        """Return the bytes kept for the parameters of a group. `dtype`: what they will be cast to, where that is to come.

        Override it where `hidden` makes a difference, which `state_bytes` cannot see.
        """
        return sum(self.state_bytes(p.shape, dtype or p.dtype) for p in group["params"])

    def check(self, groups: Iterable[ParamGroup]) -> None:
        """Raise `UserError` if the optimizer is of no use for these parameters."""

    def __str__(self) -> str:
        return as_expression(self)


def as_optimizer(optimizer: Optimizer | str) -> Optimizer:
    """Return the optimizer that an expression such as `galore(rank=128)` describes; one that is made already as it is."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    return build((parse_one(optimizer, "optimizer"),), "optimizer")[0]


def can_be_fused(groups: Iterable[ParamGroup]) -> bool:
    """Return whether torch has fused kernels for the devices of all parameters."""
    return {p.device.type for group in groups for p in group["params"]} <= {"cpu", "cuda"}
