"""Partial fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graftkit.backbone import Backbone, select_parameters
from graftkit.methods.base import Method, exactly
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Unfreeze(Method):
    """Train the chosen parts of the backbone, by default its last two blocks.

    When: a head or a small graft is not enough; layers below the unfrozen blocks are computed without gradients.
    Parameters: those of the chosen parts.
    """

    frees_base: ClassVar[bool] = True
    selects: ClassVar[bool] = True
    repeats: ClassVar[bool] = True

    sites: str = option("blocks[-2:]", "parts to train, as a selection")
    lr: float | None = option(None, "learning rate; null means 0.0001", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        group = Group("base", self.lr or 1e-4, self.name, self.lr is not None, statistics=True)
        return dict.fromkeys(select_parameters(backbone, self.sites), group)

    @classmethod
    def from_saved_modules(cls, backbone: Backbone, tensors: Mapping[str, Tensor]) -> Unfreeze | None:
        heads = {site.name for site in backbone.sites if site.role == "head"}
        owners = [name.rpartition(".")[0] for name in tensors if name not in backbone.missing]
        owners = [owner for owner in owners if owner not in heads]
        return cls(exactly(owners)) if owners else None

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}
