"""GaLore: full fine-tuning with the optimizer's state in a low-rank space."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from graftkit.backbone import Backbone, select
from graftkit.backbone.weights import weights_at
from graftkit.errors import UserError
from graftkit.methods.base import Method
from graftkit.optim.labels import Group, Labels, Projection
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class GaLore(Method):
    """Every parameter is trained, and Adam's moments of each chosen matrix are kept for a projection of its gradient.

    Zhao et al. 2024, 'GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection', algorithm 2: each
    `interval` steps the first `rank` singular vectors of the present gradient become the space in which Adam works (those
    of the shorter side); its step, times `scale`, is projected back. Moments are not reset, and decay acts on the whole
    weight. All other parameters have plain Adam, as have matrices whose shorter side is at most `rank`.
    The paper pre-trains with a rank of about a quarter of the width, a scale of 0.25 and a rate of 0.01.

    When: everything is to be trained, but Adam's two numbers for each parameter do not fit into memory. The gradients
    are whole, and kept for a step.
    Parameters: all of the backbone's; of a matrix (m, n), m <= n, the optimizer keeps m rank + 2 n rank numbers, not 2 m n.
    """

    yields = True

    rank: int = option(128, "dimensions of the space in which Adam works", at_least=1)
    sites: str = option("all-linear", "maps whose gradients are projected, as a selection")
    interval: int = option(200, "steps from one choice of the space to the next", at_least=1)
    scale: float = option(1.0, "factor on the steps of projected matrices", above=0)
    lr: float | None = option(None, "learning rate; null means 0.0001", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        group = Group("base", self.lr or 1e-4, self.name, self.lr is not None, statistics=True)
        labels = dict.fromkeys(backbone.base_parameters, group)
        projected = dataclasses.replace(group, projection=Projection(self.rank, self.interval, self.scale))
        chosen = {id(tensor) for tensor in self.matrices(backbone) if min(tensor.shape) > self.rank}
        if not chosen:
            raise UserError(
                f"galore(rank={self.rank}): no matrix at {self.sites!r} has more rows and columns than that, so nothing would "
                "be projected; lower rank, or use full()."
            )
        for name, parameter in backbone.model.named_parameters():
            if name in labels and id(parameter) in chosen:
                labels[name] = projected
        return labels

    def matrices(self, backbone: Backbone) -> list[Tensor]:
        """The weights at the sites that are matrices; at a quantized one none can be trained."""
        sites = select(
            backbone, self.sites, lambda site: any(w.value.dim() == 2 for w in weights_at(backbone, site)),
            "maps with a matrix of weights; use full() there",
        )  # fmt: skip
        weights = [weight for site in sites for weight in weights_at(backbone, site)]
        quantized = next((weight for weight in weights if weight.is_quantized), None)
        if quantized is not None:
            raise UserError(
                f"{self.name}() trains the weights themselves, and {type(quantized.module).__name__} keeps its own as "
                f"{quantized.value.dtype}; use lora() on a quantized backbone."
            )
        return [weight.value for weight in weights if weight.value.dim() == 2]

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}
