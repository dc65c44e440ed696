"""BitFit: train the biases only."""

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
    """Train the biases b of the linear layers W x + b and of the norms in the blocks, and nothing else of the backbone.

    Ben Zaken et al. 2021, 'BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models', section 3. The smaller variant of section 4, which trains only the biases of the queries and of the
    first feed-forward layer, is `sites='q,up'`. Models without biases, such as Llama, are refused.
    When: the model has biases, and the graft must be small and cost nothing at inference once folded.
    Parameters: the biases of the chosen sites, out for each linear layer and width for each norm.
    """

    frees_base: ClassVar[bool] = True
    trains_biases: ClassVar[bool] = True

    sites: str = option("blocks", "sites whose biases to train, as a selection")
    lr: float | None = option(None, "learning rate; null means 0.002", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        group = Group("base", self.lr or 2e-3, self.name, self.lr is not None, weight_decay=0.0)
        # nn.MultiheadAttention stores the biases of queries, keys and values as one, in_proj_bias
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
