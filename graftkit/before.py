"""A model as it was before a graft, and which grafts are on it."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added, base_modules
from graftkit.backbone.attention import release
from graftkit.methods.base import Addition

if TYPE_CHECKING:
    from graftkit.graft import Graft

REGISTER = "graftkit_grafts"


def grafts_of(model: nn.Module) -> dict[str, Graft]:
    """The grafts that are attached to a model, by name, in the order of their attachment."""
    return vars(model).setdefault(REGISTER, {})


class KeepStatistics(Addition):
    """Holds the running statistics of the norm it is placed on still, also while the model trains."""

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        site.training = False


def has_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics of what passes through it, as BatchNorm does."""
    return getattr(module, "running_mean", None) is not None


class Before:
    """A model as it was before `attach`, so that it can be made so again."""

    def __init__(self, backbone: Backbone) -> None:
        model = backbone.model
        self.sites = backbone.sites
        self.modules = dict(base_modules(model))
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.config = getattr(model, "config", None)
        names = ("id2label", "label2id", "_attn_implementation")
        self.settings = {n: copy.copy(getattr(self.config, n)) for n in names if hasattr(self.config, n)}
        self.attributes = {n: vars(model).get(n) for n in ("num_labels", "accepts_loss_kwargs")}

    def replaced(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that are no longer in their places, by name."""
        now = dict(model.named_modules())
        return {name: module for name, module in self.modules.items() if now.get(name) is not module}

    def restore(self, backbone: Backbone, graft: str, modules: bool = True) -> None:
        """Remove what a graft added and, with `modules`, put back what it replaced."""
        model = backbone.model
        remove_additions(model, graft)
        grafts_of(model).pop(graft, None)
        for name, module in self.replaced(model).items() if modules else ():
            model.set_submodule(name, module)
        backbone.sites = tuple(
            dataclasses.replace(site, module=backbone.module(site.name)) for site in self.sites
        )
        alone = not grafts_of(model)
        for name, parameter in model.named_parameters():
            if alone and name in self.requires_grad:  # beside another graft, the base stays frozen
                parameter.requires_grad_(self.requires_grad[name])
        for name in ("id2label", "label2id"):
            if name in self.settings:
                setattr(self.config, name, self.settings[name])
        for name, value in self.attributes.items():
            if value is None:
                vars(model).pop(name, None)
            else:
                setattr(model, name, value)
        release(model, self.settings.get("_attn_implementation"))


def remove_additions(model: nn.Module, name: str) -> None:
    """Delete the modules of the graft of that name, and their hooks."""
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, Added) and child.graft == name:
                for handle in getattr(child, "handles", []):
                    handle.remove()
                delattr(module, child_name)
