"""BAdam: AdamW on one block of the network at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftkit.errors import UserError
from graftkit.optim.base import Optimizer, ParamGroup
from graftkit.optim.shared.lowbit import adamw_step
from graftkit.optim.shared.moments import FULL, moment_bytes
from graftkit.optim.shared.partly import PartlyAdamW
from graftkit.recipe.catalogue import option

OUTSIDE = -1  # the block of parameters that lie in none
WEIGHT = "weight"


@dataclass(frozen=True)
class BAdam(Optimizer):
    """Train one block of the network after another, each for `interval` steps, with state for that block alone.

    Luo et al. 2024, 'BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models', algorithm 1:
    moments start at zero whenever the turn of a block begins, and are freed when it ends. A block whose weights are not
    fp32 keeps an fp32 copy of them during its turn, so that small updates are not lost. Parameters outside the blocks
    (embeddings, norms at the end, a head) and their state are trained in every step, as in Pan et al. 2024, 'LISA',
    or with `outside='turn'` as one more block. Gradients of all blocks are computed; those of waiting blocks are
    ignored. The order of turns is a function of `seed`. A turn is counted in steps of each parameter, so blocks that a
    method frees later take their turns independently of those freed before.

    When: the state of `adamw()` for a single block fits into memory, and that for all blocks does not.
    Memory: 2 numbers for each parameter of the largest block and outside the blocks; 3 if the weights are not fp32.
    """

    steps_in_backward: ClassVar[bool] = True
    moves_all: ClassVar[bool] = False

    interval: int = option(50, "steps of a turn", at_least=1)
    order: str = option("random", "order of the blocks", choices=("random", "ascending", "descending"))
    outside: str = option(
        "always", "when parameters outside the blocks are trained", choices=("always", "turn")
    )
    seed: int = option(0, "seed of a random order", at_least=0)
    beta1: float = option(0.9, "decay of the mean of gradients", at_least=0, below=1)
    beta2: float = option(0.999, "decay of the mean of squared gradients", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator", above=0)

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        return BlockAdamW(self.split(groups), self)

    def split(self, groups: Iterable[ParamGroup]) -> list[ParamGroup]:
        """Return groups whose parameters lie in one `block` each, all marked `own`."""
        found = []
        for group in groups:
            numbers = block_numbers(group)
            for number in dict.fromkeys(numbers):
                members = [p for p, block in zip(group["params"], numbers) if block == number]
                plain = {key: value for key, value in group.items() if key != "blocks"}
                found.append(plain | {"params": members, "block": number, "own": True})
        return found

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes for a parameter in its turn: two moments, and a copy of weights that are not fp32."""
        count = math.prod(shape)
        copy = 0 if dtype == torch.float32 else count * torch.float32.itemsize
        return moment_bytes(count, FULL) + copy

    def total_bytes(self, groups: Iterable[ParamGroup], dtype: torch.dtype | None = None) -> int:
        """Return the most bytes of state at any time: those of the largest block, and of what is always trained."""
        sizes: dict[int, int] = {}
        for group in self.split(groups):
            sizes[group["block"]] = sizes.get(group["block"], 0) + self.group_bytes(group, dtype)
        always = sizes.pop(OUTSIDE, 0) if self.outside == "always" else 0
        return always + max(sizes.values(), default=0)

    def check(self, groups: Iterable[ParamGroup]) -> None:
        if len({number for group in groups for number in block_numbers(group)} - {OUTSIDE}) < 2:
            raise UserError(
                f"train.optimizer={self}: fewer than two blocks of the backbone are trained, so there are no turns; train "
                "more of the backbone, or leave train.optimizer out."
            )


def block_numbers(group: ParamGroup) -> list[int]:
    """Return the number of the block of each parameter of a group; `OUTSIDE` for those in none."""
    numbers = group.get("blocks") or [None] * len(group["params"])
    return [OUTSIDE if number is None else number for number in numbers]


class BlockAdamW(PartlyAdamW):
    """AdamW that trains the parameters of one `block` at a time. Others keep no state but `taken`.

    State of a parameter: `taken`, the steps in which it had a gradient. In its turn also `step`, from its beginning, both
    moments in fp32, and `weight`, the fp32 copy of weights of another dtype.
    """

    def __init__(self, groups: list[ParamGroup], options: BAdam) -> None:
        super().__init__(groups, (options.beta1, options.beta2), options.eps)
        self.options = options
        blocks = sorted({group["block"] for group in groups})
        self.blocks = [block for block in blocks if block != OUTSIDE or options.outside == "turn"]

    def is_active(self, block: int, taken: int) -> bool:
        """Return whether parameters of a block are trained in the step that follows `taken` steps."""
        if block not in self.blocks:
            return True
        cycle, place = divmod(taken // self.options.interval, len(self.blocks))
        order = self.blocks if self.options.order != "descending" else self.blocks[::-1]
        if self.options.order == "random":
            order = random.Random(f"{self.options.seed} {cycle}").sample(self.blocks, len(self.blocks))
        return order[place] == block

    def take(self, members: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        active = []
        for parameter, group in members:
            state = self.state[parameter]
            taken = state["taken"] = state.get("taken", 0) + 1
            if self.is_active(group["block"], taken - 1):
                active.append((parameter, group))
            else:
                state.clear()
                state["taken"] = taken
        super().take(active)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if parameter.dtype == torch.float32:
            adamw_step(parameter, gradient, state, group, FULL)
            return
        if WEIGHT not in state:
            state[WEIGHT] = parameter.detach().float()
        adamw_step(state[WEIGHT], gradient, state, group, FULL)
        parameter.copy_(state[WEIGHT])
