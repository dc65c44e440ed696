"""What `attach` places on a model beside the method's own additions, so that what is frozen stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import base_modules, has_statistics
from graftkit.methods.base import Addition, place
from graftkit.optim.labels import Labels


class KeepStatistics(Addition):
    """Holds the running statistics of the norm it is placed on still, also while the model trains."""

    changes_outputs = False
    holds = True  # not while another graft is trained, which says itself what stays

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.holds:
            site.training = False


class KeepPadding(Addition):
    """Keeps an `nn.TransformerEncoder` from packing padded rows into a nested tensor in eval mode.

    Whether it packs them is decided by its first layer alone. Trained layers behind a frozen one, and layers with
    additions, cannot read such a tensor. So also while the graft is silent: its hooks are still there.
    """

    changes_outputs = False
    packs = False

    def before(self, site: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.packs = self.packs or site.use_nested_tensor
        site.use_nested_tensor = False

    def after(self, site: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.packs:  # not where another graft's has done it
            site.use_nested_tensor, self.packs = True, False
        return output

    _before, _after = before, after


def moving_statistics(backbone: Backbone, labels: Labels) -> Iterator[str]:
    """Names of the running statistics that move while the parameters beside them are trained."""
    for name, group in labels.items():
        owner = name.rpartition(".")[0]
        module = backbone.module(owner)
        if group.statistics and has_statistics(module):
            for buffer, _ in module.named_buffers(recurse=False):
                yield f"{owner}.{buffer}".lstrip(".")


def hold_still(model: nn.Module, name: str, statistics: set[str]) -> None:
    """Keep running statistics that are not among `statistics` still, and padded rows as they are given."""
    for module_name, module in base_modules(model):
        if has_statistics(module) and f"{module_name}.running_mean".lstrip(".") not in statistics:
            place(module, f"statistics_{name}", KeepStatistics())
        if isinstance(module, nn.TransformerEncoder):
            place(module, f"padding_{name}", KeepPadding())
