"""Taking parts out of training again."""

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
    """The chosen parts stay as they are although another method frees them: full() + freeze('embeddings').

    When: a part of what another method trains has to stay as it is.
    Parameters: none of its own; those of `sites` are taken out.
    """

    needs_base: ClassVar[bool] = True
    takes_out: ClassVar[bool] = True
    repeats: ClassVar[bool] = True
    stage: ClassVar[int] = 7

    sites: str = option("embeddings", "parts that stay frozen, as a selection")

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        return {}

    def relabel(self, backbone: Backbone, labels: Labels) -> Labels:
        frozen = set(select_parameters(backbone, self.sites))
        if not frozen & set(labels):
            raise UserError(
                f"freeze({self.sites!r}) changes nothing: no other method trains any of these "
                f"{len(frozen)} parameters. Leave it out, or put a method beside it that trains parts of the backbone."
            )
        return {name: group for name, group in labels.items() if name not in frozen}

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}
