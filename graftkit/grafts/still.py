"""Modules that `attach` places on a model beside the method's own additions, so that frozen state does not change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import base_modules, has_statistics
from graftkit.methods.base import Addition, place
from graftkit.optim.labels import Labels


class KeepStatistics(Addition):
    """Freezes the running statistics of the norm it is placed on, even while the model trains."""

    changes_outputs = False
    holds = True  # False while another graft is trained, which has its own

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.holds:
            site.training = False


class KeepPadding(Addition):
    """Keeps an `nn.TransformerEncoder` from packing padded rows into a nested tensor in eval mode.

    It decides that by its first layer alone. Trained layers after a frozen one, and layers with additions, cannot read
    such a tensor. This holds for an inactive graft too, whose hooks are still there.
    """

    changes_outputs = False
    packs = False

    def before(self, site: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.packs = self.packs or site.use_nested_tensor
        site.use_nested_tensor = False

    def after(self, site: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.packs:  # unless another graft's `KeepPadding` did it
            site.use_nested_tensor, self.packs = True, False
        return output

    _before, _after = before, after


def moving_statistics(backbone: Backbone, labels: Labels) -> Iterator[str]:
    """Yield the names of running statistics that are updated while the parameters beside them are trained."""
    for name, group in labels.items():
        owner = name.rpartition(".")[0]
        if group.statistics and has_statistics(module := backbone.module(owner)):
            for buffer, _ in module.named_buffers(recurse=False):
                yield f"{owner}.{buffer}".lstrip(".")


def hold_still(model: nn.Module, name: str, statistics: set[str]) -> None:
    """Freeze running statistics that are not in `statistics`, and keep padded rows unpacked."""
    for module_name, module in base_modules(model):
        if has_statistics(module) and f"{module_name}.running_mean".lstrip(".") not in statistics:
            place(module, f"statistics_{name}", KeepStatistics())
        if isinstance(module, nn.TransformerEncoder):
            place(module, f"padding_{name}", KeepPadding())
