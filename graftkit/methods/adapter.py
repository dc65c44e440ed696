"""Bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftkit.backbone import Backbone
from graftkit.methods.base import Method, labels_of
from graftkit.methods.shared.advice import general
from graftkit.methods.shared.bottlenecks import Place, bottleneck_at, find_places
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Adapter(Method):
    """Insert bottlenecks h + s (W2 f(W1 x + b1) + b2) after attention and feed-forward layers, or parallel to the latter.

    Placements: 'houlsby' (Houlsby et al. 2019, 'Parameter-Efficient Transfer Learning for NLP', section 2.1): x = h at
    the output of attention and of the feed-forward part, after the dropout if there is one and before the residual
    sum and the norm; the norms are trained too. 'pfeiffer' (Pfeiffer et al. 2021, 'AdapterFusion'; AdapterHub's
    `seq_bn`): one after the residual sum of the feed-forward part; if the block ends with a norm, h = LN(sum), its
    output becomes LN(sum + change(h)) with the same norm. 'parallel' (He et al. 2022, 'Towards a Unified View of
    Parameter-Efficient Transfer Learning'): h is the output of the feed-forward part, x its input, s = 4. A block of
    convolutions has one after its last convolution. Leaving lower blocks out of `sites` is AdapterDrop (Rücklé et al.
    2021).

    W1 is initialised with standard deviation 0.02, W2 and the biases with zeros, so training starts exactly at the base
    model.
    When: a graft of a few percent of the backbone's size should come close to full fine-tuning and need not be folded.
    Parameters: 2 * width * bottleneck + bottleneck + width for each place, two places per block for 'houlsby' and one
    for the others, plus the norms of these blocks if they are trained.
    """

    frees_base: ClassVar[dict[str, tuple]] = {"placement": ("houlsby",), "norms": (True,)}
    stage: ClassVar[int] = 3
    composes: ClassVar[bool] = True

    bottleneck: int = option(64, "width of the bottleneck", at_least=1)
    placement: str = option(
        "houlsby", "position of the adapters in a block", choices=("houlsby", "pfeiffer", "parallel")
    )
    sites: str = option("blocks", "blocks, or parts of them, that get adapters, as a selection")
    nonlinearity: str | None = option(
        None, "f; null means gelu for houlsby, relu for the others", choices=("gelu", "relu", "silu", "tanh")
    )
    scale: float | None = option(None, "s; null means 4 for parallel, 1 for the others", above=0)
    dropout: float = option(0.0, "dropout on the output of the bottleneck", at_least=0, below=1)
    norms: bool | None = option(None, "also train the norms of these blocks; null means for houlsby only")
    lr: float | None = option(None, "learning rate; null means 0.001", above=0)

    @property
    def trains_norms(self) -> bool:
        return self.placement == "houlsby" if self.norms is None else self.norms

    def targets(self, backbone: Backbone) -> list[Place]:
        return find_places(backbone, self.placement, self.sites, self.name)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        group = Group("added", self.lr or 1e-3, self.name, self.lr is not None)
        labels: Labels = {}
        places = self.targets(backbone)
        for place in places:
            made = bottleneck_at(
                place, self.placement, self.bottleneck, self.nonlinearity, self.scale, self.dropout
            )
            made.insert(place, f"{self.name}_{graft}")
            labels |= labels_of(backbone, f"{place.name}.{self.name}_{graft}", group)
        if self.trains_norms:
            base = Group("base", group.lr, self.name, group.fixed_lr)
            blocks = {place.block for place in places}
            for site in backbone.sites:
                if site.block in blocks and site.role == "norm":
                    for name, _ in site.module.named_parameters(recurse=False):
                        labels[f"{site.name}.{name}"] = base
        return labels

    def never_folds(self) -> str:
        return (
            "adapter() cannot be folded: a bottleneck with a nonlinearity has no equivalent in the plain architecture. "
            f"Keep the graft folder and load it with graftkit.load, or use {general()} if folding matters."
        )
