"""BitFit: only biases are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graftkit.backbone import Backbone, select_parameters
from graftkit.methods.base import Method, refuse_unless
from graftkit.methods.shared.advice import general, selecting
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class BitFit(Method):
    """The biases b of the maps W x + b and of the norms in the blocks are trained, and nothing else of the backbone.

    Ben Zaken et al. 2021, 'BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models', section 3; the smaller form of section 4, with queries and the inner map of the feed-forward part
    only, is `sites='q,up'`. Models without biases (Llama and its kin) are refused.
    When: the model has biases, and a graft has to be small and, once folded, without any cost.
    Parameters: the biases of the chosen sites, out for each map and width for each norm.
    """

    frees_base: ClassVar[bool] = True
    trains_biases: ClassVar[bool] = True

    sites: str = option("blocks", "sites whose biases are trained, as a selection")
    lr: float | None = option(None, "learning rate; null means 0.002", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        group = Group("base", self.lr or 2e-3, self.name, self.lr is not None, weight_decay=0.0)
        # nn.MultiheadAttention keeps those of queries, keys and values as one, in_proj_bias
        names = select_parameters(backbone, self.sites)
        labels = {name: group for name in names if name.rpartition(".")[2] in ("bias", "in_proj_bias")}
        refuse_unless(
            labels,
            f"bitfit() trains biases, but {self.sites!r} of {backbone.source} have none. "
            f"Use {general()} or {selecting('norms')} instead.",
        )
        return labels

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}
