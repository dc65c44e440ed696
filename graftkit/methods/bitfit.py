"""BitFit: only biases are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.catalogue import option
from graftkit.methods.base import Group, Labels, Method, refuse_unless


@dataclass(frozen=True)
class BitFit(Method):
    """The biases of the blocks are trained, those of their norms among them, and nothing else of the backbone.

    Ben Zaken et al. 2021, 'BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models'. Models without biases (Llama and its kin) are refused.
    """

    lr: float | None = option(None, "learning rate; null means 0.002", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        group = Group("base", self.lr or 2e-3, self.name, self.lr is not None, weight_decay=0.0)
        inside = {site.name for site in backbone.sites if site.block is not None}
        labels = {
            name: group
            for name in backbone.base_parameters
            if name.rpartition(".")[2] == "bias" and name.rpartition(".")[0] in inside
        }
        refuse_unless(
            labels,
            f"bitfit() trains biases, but the blocks of {backbone.source} have none. "
            "Use lora() or unfreeze('norms') instead.",
        )
        return labels

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}
