"""Freeze parts that another method would train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graftkit.backbone import Backbone, select_parameters
from graftkit.errors import UserError
from graftkit.methods.base import Method
from graftkit.optim.labels import Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Freeze(Method):
    """Keep the chosen parts frozen even if another method unfreezes them: full() + freeze('embeddings').

    When: one part of what another method trains must not change.
    Parameters: none; it removes those of `sites` from training.
    """

    needs_base: ClassVar[bool] = True
    takes_out: ClassVar[bool] = True
    repeats: ClassVar[bool] = True
    stage: ClassVar[int] = 7

    sites: str = option("embeddings", "parts to keep frozen, as a selection")

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        return {}

    def relabel(self, backbone: Backbone, labels: Labels) -> Labels:
        frozen = set(select_parameters(backbone, self.sites))
        if not frozen & set(labels):
            raise UserError(
                f"freeze({self.sites!r}) changes nothing: no other method trains any of these "
                f"{len(frozen)} parameters. Leave it out, or add a method that trains parts of the backbone."
            )
        return {name: group for name, group in labels.items() if name not in frozen}

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}
