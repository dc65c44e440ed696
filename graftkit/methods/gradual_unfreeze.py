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
    """Train the whole backbone, unfreezing it from the top: one more block every `every` epochs or steps.

    Howard and Ruder 2018, 'Universal Language Model Fine-tuning for Text Classification', section 3.3: in epoch e,
    counted from 0, the last e blocks are trained. Parts below all blocks, such as embeddings, follow one turn after the
    first block; parts above the last block are unfrozen together with it. A method that trains parameters from the
    start (head, lora) has the first turn to itself; without one, the last block starts. With `decay`, the learning
    rate of a block is lr * decay^(blocks above it), section 3.2; the paper uses decay = 1 / 2.6.
    Your own training loop trains everything from the start unless it follows `graft.labels_at(step, epoch)`.
    When: full fine-tuning forgets too much of what the model knew, as it often does with few rows.
    Parameters: all parameters of the backbone.
    """

    frees_base: ClassVar[bool] = True
    yields: ClassVar[int] = 2

    every: float = option(1, "epochs or steps until the next block is unfrozen", above=0)
    unit: str = option("epochs", "what `every` counts", choices=("epochs", "steps"))
    decay: float = option(
        1.0, "factor on the learning rate from each block to the one below", at_least=0.01, at_most=1
    )
    lr: float | None = option(None, "learning rate; null means 0.0001", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit == "steps" and self.every != int(self.every):
            raise UserError(
                f"gradual_{selecting()}: every is {self.every}, but steps are whole numbers; use unit='epochs' for parts of an epoch."
            )

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        if not backbone.blocks:
            raise UserError(
                f"gradual_{selecting()} unfreezes block by block, but {backbone.source} has no blocks; use {covering()}, or "
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
