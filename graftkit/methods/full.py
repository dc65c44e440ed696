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
    """Every parameter of the backbone is trained. Combine it with layerwise_lr to keep its lower layers.

    When: rows are many and there is memory for the gradients of everything; what other methods are measured against.
    Parameters: all of the backbone's.
    """

    frees_base: ClassVar[bool] = True
    covers: ClassVar[bool] = True
    yields: ClassVar[int] = 2

    lr: float | None = option(None, "learning rate; null means 0.00005", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        group = Group("base", self.lr or 5e-5, self.name, self.lr is not None, statistics=True)
        return {name: group for name in backbone.base_parameters}

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}
