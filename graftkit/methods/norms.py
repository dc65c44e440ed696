"""Norm tuning: train the gains and biases of the norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graftkit.backbone import Backbone, Site, select
from graftkit.backbone.anatomy import is_norm
from graftkit.errors import UserError
from graftkit.methods.base import Method, PeftForm, exactly, refuse_unless
from graftkit.methods.shared.advice import general, recommended
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Norms(Method):
    """Train the gains g and biases b of the norms, g * (x - mean) / std + b, and nothing else of the backbone.

    Zhao et al. 2024, 'Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning', section 2; for
    BatchNorm Frankle et al. 2021, 'Training BatchNorm and Only BatchNorm'. Works for LayerNorm, RMSNorm, GroupNorm and
    BatchNorm. With `statistics`, BatchNorm's running mean and variance are updated on the new data during training and
    saved with the graft; without it, they stay those of the base.
    When: the graft must be small and the model has few biases, or the new data differ from what the norms were trained on.
    Parameters: the gains and biases of the chosen norms, `width` each.
    """

    peft_types = ("LN_TUNING",)
    frees_base: ClassVar[bool] = True

    sites: str = option("norms", "norms to train, as a selection")
    statistics: bool = option(False, "also update BatchNorm's running mean and variance")
    lr: float | None = option(None, "learning rate; null means 0.005", above=0)

    def targets(self, backbone: Backbone) -> list[Site]:
        if not any(is_norm(site.module) for site in backbone.sites):
            raise UserError(
                f"norms() trains the gains of norms, but {backbone.source} has none. Use {recommended('is_general', 'trains_biases')} instead."
            )
        return select(backbone, self.sites, lambda site: is_norm(site.module), "norms")

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        labels: Labels = {}
        moving = []
        for site in self.targets(backbone):
            moves = self.statistics and keeps_statistics(site.module)
            moving += [site.name] * moves
            group = Group("base", self.lr or 5e-3, self.name, self.lr is not None, 1.0, 0.0, moves)
            labels |= {
                f"{site.name}.{name}": group for name, _ in site.module.named_parameters(recurse=False)
            }
        refuse_unless(labels, f"norms() found no gains in {backbone.source}; use {general()} instead.")
        if self.statistics and not moving:
            raise UserError(
                f"norms(statistics=True): none of the norms of {backbone.source} keeps running statistics, as BatchNorm "
                "does; leave statistics out."
            )
        return labels

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        return {}

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm:
        sites = self.targets(backbone)
        tensors = {
            f"base_model.model.{site.name}.ln_tuning_layers.{name}": tensor
            for site in sites
            for name, tensor in site.module.state_dict(keep_vars=True).items()
            if "." not in name  # the norm's own parameters, not those that another graft placed on it
        }
        config = {"peft_type": "LN_TUNING", "target_modules": [site.name for site in sites]}
        return PeftForm(config, tensors)

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        found = {
            f"{key[1]}.{key[2]}": tensor
            for key, tensor in reading.take(r"(.+)\.ln_tuning_layers\.(\w+)").items()
        }
        statistics = any(name.endswith(".running_mean") for name in found)
        options = {
            "sites": exactly(name.rpartition(".")[0] for name in found),
            "statistics": statistics,
        }
        return options, found


def keeps_statistics(module: nn.Module) -> bool:
    """Return whether a norm has a running mean and variance that are updated during training."""
    return getattr(module, "running_mean", None) is not None
