"""Bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graftkit.backbone import Backbone, Site
from graftkit.backbone.anatomy import features
from graftkit.catalogue import option
from graftkit.errors import NotFoldable, UserError
from graftkit.methods.base import Addition, Group, Labels, Method, labels_of, multiply, new_parameter, place


@dataclass(frozen=True)
class Adapter(Method):
    """Two bottlenecks in each block: x + W2 gelu(W1 x + b1) + b2 after attention and after the feed-forward part.

    Houlsby et al. 2019, 'Parameter-Efficient Transfer Learning for NLP', section 2: before the residual sum
    and the norm, behind the dropout where there is one; norms are trained too. W1 is drawn with standard
    deviation 0.02, W2 and the biases are zero, so that training starts at the base model exactly.
    Parameters: 2 * blocks * (2 * width * bottleneck + bottleneck + width), and the norms of the blocks.
    """

    bottleneck: int = option(64, "width of the bottleneck", at_least=1)
    norms: bool = option(True, "whether the norms of the blocks are trained too")
    lr: float | None = option(None, "learning rate; null means 0.001", above=0)

    def targets(self, backbone: Backbone) -> list[tuple[str, nn.Module, int]]:
        """(name, module, width) of the modules whose outputs are adapted: o and down, or the dropout behind them."""
        found = []
        for site in backbone.sites:
            if site.block is not None and site.role in ("o", "down"):
                name, module = _behind_dropout(backbone, site)
                found.append((name, module, features(site.module)[1]))
        if not found:
            raise UserError(
                f"adapter() found no attention or feed-forward output in {backbone.source}; use lora() instead."
            )
        return found

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        group = Group("added", self.lr or 1e-3, self.name, self.lr is not None)
        labels: Labels = {}
        device = next(backbone.model.parameters()).device  # a dropout, where most are placed, has none
        for name, module, width in self.targets(backbone):
            bottleneck = Bottleneck(width, self.bottleneck).to(device)
            place(module, f"adapter_{graft}", bottleneck)
            labels |= labels_of(backbone, f"{name}.adapter_{graft}", group)
        if self.norms:
            base = Group("base", group.lr, self.name, group.fixed_lr)
            for site in backbone.sites:
                if site.block is not None and site.role == "norm":
                    for name, _ in site.module.named_parameters(recurse=False):
                        labels[f"{site.name}.{name}"] = base
        return labels

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        raise NotFoldable(
            "adapter() cannot be folded: a bottleneck with a nonlinearity has no equal in the plain architecture. "
            "Keep the graft folder and load it with graftkit.load, or use lora() where folding matters."
        )


def _behind_dropout(backbone: Backbone, site: Site) -> tuple[str, nn.Module]:
    """The dropout that follows a map in the same parent, or the map itself.

    Where the parent also holds the query map, a dropout is taken for that of the attention's probabilities
    unless its name tells otherwise (`resid_dropout`).
    """
    parent_name, _, leaf = site.name.rpartition(".")
    children = list(backbone.module(parent_name).named_children())
    with_query = any(
        other.name.rpartition(".")[0] == parent_name and other.role in ("q", "qkv")
        for other in backbone.sites
    )
    later = children[[name for name, _ in children].index(leaf) + 1 :]
    for name, child in later:
        if isinstance(child, nn.Dropout) and (not with_query or "resid" in name):
            return f"{parent_name}.{name}", child
    return site.name, site.module


class Bottleneck(Addition):
    """x + W2 gelu(W1 x + b1) + b2 on the output of its site; down (bottleneck, width), up (width, bottleneck)."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = new_parameter(bottleneck, width, std=0.02)
        self.down_bias = new_parameter(bottleneck)
        self.up = new_parameter(width, bottleneck)
        self.up_bias = new_parameter(width)

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        low = nn.functional.gelu(multiply(output, self.down, self.down_bias))
        return output + multiply(low, self.up, self.up_bias).to(output.dtype)
