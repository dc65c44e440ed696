"""Discriminative learning rates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.errors import UserError
from graftkit.methods.base import Method
from graftkit.optim.labels import Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class LayerwiseLR(Method):
    """Lower the learning rate of each block with its depth: lr * decay^(blocks above it); new parameters keep theirs.

    Howard and Ruder 2018, 'Universal Language Model Fine-tuning', section 3.2, with one decay
    factor per block as in ELECTRA's fine-tuning. The last block and everything above it have the full rate, the
    embeddings lr * decay^blocks; a part between two blocks has the rate of the lower one.
    When: it is combined with full() or unfreeze(), and lower blocks should stay close to the base.
    Parameters: none; it changes learning rates.
    """

    needs_base: ClassVar[bool] = True
    stage: ClassVar[int] = 8

    decay: float = option(0.9, "factor from each block to the one below", at_least=0.01, at_most=1)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        return {}

    def relabel(self, backbone: Backbone, labels: Labels) -> Labels:
        if not any(group.role == "base" for group in labels.values()):
            raise UserError(
                "layerwise_lr() changes nothing: no parameter of the backbone itself is trained. "
                "Add a method that trains parts of the backbone."
            )
        top = len(backbone.blocks) - 1
        heights = backbone.heights
        return {
            name: dataclasses.replace(group, lr_scale=group.lr_scale * self.decay ** (top - heights[name]))
            if group.role == "base" and name in heights
            else group
            for name, group in labels.items()
        }

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}
