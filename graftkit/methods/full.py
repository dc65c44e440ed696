"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.methods.base import Method
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Full(Method):
    """Train every parameter of the backbone. Combine it with layerwise_lr to keep the lower layers close to the base.

    When: there are many rows, and memory for the gradients of all parameters; the baseline for other methods.
    Parameters: all parameters of the backbone.
    """

    aliases: ClassVar[tuple[str, ...]] = ("full_finetuning", "full_fine_tuning", "finetune")
    frees_base: ClassVar[bool] = True
    covers: ClassVar[bool] = True
    yields: ClassVar[int] = 2

    lr: float | None = option(None, "learning rate; null means 0.00005", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        group = Group("base", self.lr or 5e-5, self.name, self.lr is not None, statistics=True)
        return {name: group for name in backbone.base_parameters}

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}
