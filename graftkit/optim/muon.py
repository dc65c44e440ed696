"""Muon: orthogonalized momentum for matrices, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftkit.errors import UserError
from graftkit.optim.base import Optimizer, ParamGroup
from graftkit.optim.shared.partly import PartlyAdamW, split, whole_bytes
from graftkit.recipe.catalogue import option

# the rules of `torch.optim.Muon` for the size of a step
RULES = {"rms": "match_rms_adamw", "original": "original"}


@dataclass(frozen=True)
class Muon(Optimizer):
    """Replace the momentum of each matrix in the body by the nearest orthogonal matrix; AdamW for everything else.

    Jordan et al. 2024, 'Muon: An optimizer for hidden layers in neural networks': with Nesterov momentum, and five
    Newton-Schulz iterations, which are computed in bf16. This is `torch.optim.Muon`. With `size='rms'`, steps are as
    large as AdamW's usually are (Liu et al. 2025, 'Muon is Scalable for LLM Training'), so that `train.lr` can be the
    learning rate of both; 'original' is the paper's sqrt(max(1, rows / columns)), for learning rates of about 0.02, with
    a `rest` that brings those of AdamW down again. Matrices are the weights of linear layers in the body of the
    network; embeddings, norms, biases, the head and parameters added by a method have AdamW.

    When: pre-training, or training all weights for long; it needs fewer steps than AdamW, and less memory.
    Memory: 1 number for each weight of a matrix, 2 for others.
    """

    steps_in_backward: ClassVar[bool] = True

    momentum: float = option(0.95, "decay of the momentum of matrices", at_least=0, below=1)
    nesterov: bool = option(True, "look one step ahead with the momentum")
    iterations: int = option(5, "Newton-Schulz iterations", at_least=1, at_most=99)
    size: str = option(
        "rms", "size of a step: that of AdamW, or the original one", choices=("rms", "original")
    )
    rest: float = option(1.0, "factor on the learning rate of what AdamW trains", above=0)
    beta1: float = option(0.9, "AdamW's decay of the mean of gradients", at_least=0, below=1)
    beta2: float = option(0.999, "AdamW's decay of the mean of squared gradients", at_least=0, below=1)
    eps: float = option(1e-8, "added to AdamW's denominator", above=0)

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        divided = split(groups, lambda group, parameter: self.is_matrix(group, parameter.shape))
        scaled = [
            group if group["own"] or "lr" not in group else group | {"lr": group["lr"] * self.rest}
            for group in divided
        ]
        return MuonAndAdamW(scaled, self)

    def is_matrix(self, group: ParamGroup, shape: Sequence[int]) -> bool:
        """Return whether a parameter of a group is trained by Muon."""
        return group.get("hidden", True) and len(shape) == 2

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of the momentum of a matrix in its dtype; of a parameter of another shape, AdamW's."""
        return math.prod(shape) * dtype.itemsize if len(shape) == 2 else whole_bytes(math.prod(shape), dtype)

    def group_bytes(self, group: ParamGroup, dtype: torch.dtype | None = None) -> int:
        if group.get("hidden", True):
            return super().group_bytes(group, dtype)
        return sum(whole_bytes(p.numel(), dtype or p.dtype) for p in group["params"])

    def check(self, groups: Iterable[ParamGroup]) -> None:
        if not any(self.is_matrix(group, p.shape) for group in groups for p in group["params"]):
            raise UserError(
                f"train.optimizer={self}: no linear layer of the backbone is trained, so Muon would train nothing; train "
                "more of the backbone, or leave train.optimizer out."
            )


class MuonAndAdamW(PartlyAdamW):
    """`torch.optim.Muon` for the groups marked `own`, on the state and groups of this optimizer. State: momentum_buffer."""

    def __init__(self, groups: list[ParamGroup], options: Muon) -> None:
        super().__init__(groups, (options.beta1, options.beta2), options.eps)
        self.options = options
        self.muon: torch.optim.Muon | None = None

    def take(self, members: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        options = self.options
        own = [group for group in self.param_groups if group.get("own")]
        if own and members:
            self.muon = self.muon or torch.optim.Muon(
                [parameter for parameter, _ in members],
                momentum=options.momentum,
                nesterov=options.nesterov,
                ns_steps=options.iterations,
                adjust_lr_fn=RULES[options.size],
            )
            self.muon.state = self.state
            self.muon.param_groups = [self.muon.defaults | {k: group[k] for k in ("params", "lr", "weight_decay")} for group in own]  # fmt: skip
            self.muon.step()
