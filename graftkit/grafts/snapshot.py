"""The state of a model before a graft is attached, so that it can be restored."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added, base_modules
from graftkit.backbone.attention import release
from graftkit.backbone.walk import modules_of, parameters_of
from graftkit.grafts.register import grafts_of

if TYPE_CHECKING:
    from graftkit.grafts.graft import Graft

CONFIG_SETTINGS = ("id2label", "label2id", "_attn_implementation")
MODEL_SETTINGS = ("num_labels", "accepts_loss_kwargs")


class Snapshot:
    """The state of a model before `attach`, so that it can be restored."""

    def __init__(self, backbone: Backbone) -> None:
        model = backbone.model
        first = next(iter(grafts_of(model).values()), None)
        self.sites = backbone.sites
        self.processor = backbone.processor
        self.modules = dict(base_modules(model))
        self.requires_grad = {name: p.requires_grad for name, p in parameters_of(model).items()}
        # that of the base without any graft, whichever graft is removed last
        self.base_requires_grad: dict[str, bool] = (
            first.snapshot.base_requires_grad if first else self.requires_grad
        )
        self.settings = settings_of(model)
        self.attention: str | None = (
            first.snapshot.attention if first else self.settings.get("_attn_implementation")
        )

    def replaced(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that were replaced since, by name."""
        now = modules_of(model)
        return {name: module for name, module in self.modules.items() if now.get(name) is not module}

    def changed_settings(self, model: nn.Module) -> dict[str, Any]:
        """Return the previous values of settings that have changed since."""
        now = settings_of(model)
        return {
            name: value
            for name, value in self.settings.items()
            if name != "_attn_implementation" and now.get(name) != value
        }

    def restore(self, backbone: Backbone, graft: str) -> None:
        """Restore the model after an `attach` that failed."""
        model = backbone.model
        remove_additions(model, graft)
        for name, module in self.replaced(model).items():
            model.set_submodule(name, module)
        set_settings(model, self.changed_settings(model))
        for name, parameter in parameters_of(model).items():
            if name in self.requires_grad:
                parameter.requires_grad_(self.requires_grad[name])
        backbone.sites = self.sites
        backbone.processor = self.processor
        release(model, self.settings.get("_attn_implementation"))

    def remove(self, graft: Graft) -> None:
        """Remove a disabled graft from the model; with the last one, the base's `requires_grad` is restored."""
        model, backbone = graft.model, graft.backbone
        others = grafts_of(model)
        others.pop(graft.name, None)
        remove_additions(model, graft.name)
        for other in others.values():  # modules that another graft replaced may hold this graft's additions
            for module in other.replaced.values():
                remove_additions(module, graft.name)
        backbone.sites = tuple(
            dataclasses.replace(site, module=backbone.module(site.name)) for site in self.sites
        )
        is_trained = not any(all(p.requires_grad for p in o.parameters.values()) for o in others.values())
        for name, parameter in parameters_of(model).items():
            if not others and name in self.base_requires_grad:
                parameter.requires_grad_(self.base_requires_grad[name])
            elif is_trained and name in graft.labels:  # beside other grafts, the base stays frozen
                parameter.requires_grad_(False)
        if backbone.processor is graft.processor:  # else a later graft, or the user, put another one there
            backbone.processor = self.processor
        release(model, self.attention)


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Return the settings that a new head changes on a model beside its modules."""
    config = getattr(model, "config", None)
    settings = {name: copy.copy(getattr(config, name)) for name in CONFIG_SETTINGS if hasattr(config, name)}
    return settings | {name: vars(model).get(name) for name in MODEL_SETTINGS}


def set_settings(model: nn.Module, settings: dict[str, Any]) -> None:
    """Set settings on a model; None removes one of the model's own attributes."""
    for name, value in settings.items():
        if name in CONFIG_SETTINGS:
            setattr(model.config, name, value)
        elif value is None:
            vars(model).pop(name, None)
        else:
            setattr(model, name, value)


def claim(model: nn.Module, present: set[nn.Module], name: str) -> None:
    """Set the graft's name on added modules that are not in `present`."""
    for module in modules_of(model).values():
        if isinstance(module, Added) and module not in present:
            module.graft = name


def remove_additions(model: nn.Module, name: str) -> None:
    """Delete the modules of a graft, and their hooks."""
    for module in modules_of(model).values():
        for child_name, child in list(module.named_children()):
            if isinstance(child, Added) and child.graft == name:
                for handle in getattr(child, "handles", []):
                    handle.remove()
                delattr(module, child_name)
