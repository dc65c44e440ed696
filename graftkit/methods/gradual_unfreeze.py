"""Gradual unfreezing."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.errors import UserError
from graftkit.methods.base import Method
from graftkit.methods.shared.advice import covering, selecting
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option

ROUNDING = 1e-9  # 0.3 / 0.1 is a little less than 3


@dataclass(frozen=True)
class GradualUnfreeze(Method):
    """The whole backbone is trained, freed from the top: one more block after each so many epochs or steps.

    Howard and Ruder 2018, 'Universal Language Model Fine-tuning for Text Classification', section 3.3: in epoch e the
    last e blocks are trained, counted from 0; what lies below all blocks, such as embeddings, comes one turn after the
    first block. Beside a method that trains something of its own from the start (head, lora) that has the first
    turn alone; without one the last block has it. What lies above the last block comes with it. With `decay`,
    a block's rate is lr * decay^(blocks above it), section 3.2; the paper has decay = 1 / 2.6.
    A loop of your own trains everything from the start unless it asks `graft.labels_at(step, epoch)`.
    When: full fine-tuning forgets too much of what the model knew, as with few rows.
    Parameters: all of the backbone's.
    """

    frees_base: ClassVar[bool] = True
    yields: ClassVar[int] = 2

    every: float = option(1, "how many epochs or steps until the next block is freed", above=0)
    unit: str = option("epochs", "what `every` counts", choices=("epochs", "steps"))
    decay: float = option(
        1.0, "factor on the learning rate from one block to the one below it", at_least=0.01, at_most=1
    )
    lr: float | None = option(None, "learning rate; null means 0.0001", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit == "steps" and self.every != int(self.every):
            raise UserError(
                f"gradual_{selecting()}: every is {self.every}, but steps are whole; use unit='epochs' for parts of an epoch."
            )

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        if not backbone.blocks:
            raise UserError(
                f"gradual_{selecting()} frees one block after another, but {backbone.source} has none; use {covering()}, or "
                f"{selecting()} with a selection."
            )
        group = Group("base", self.lr or 1e-4, self.name, self.lr is not None, statistics=True)
        top = len(backbone.blocks) - 1
        return {
            name: dataclasses.replace(group, lr_scale=self.decay ** (top - backbone.heights[name]))
            for name in backbone.base_parameters
        }

    def labels_at(self, backbone: Backbone, labels: Labels, step: int, epoch: float) -> Labels:
        passed = step if self.unit == "steps" else epoch
        turns = math.floor(passed / self.every + ROUNDING)
        if all(group.method == self.name for group in labels.values()):
            turns += 1
        lowest = len(backbone.blocks) - turns
        if lowest < 0:
            return labels
        return {
            name: group
            for name, group in labels.items()
            if group.method != self.name or backbone.heights[name] >= lowest
        }

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}
