"""Switching a graft off and on: the base's own values and modules in the place of those that it trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from graftkit.errors import UserError
from graftkit.grafts.fold import unfolded
from graftkit.grafts.guards import own_trained
from graftkit.grafts.snapshot import set_settings, settings_of

if TYPE_CHECKING:
    from graftkit.grafts.graft import Graft


def swap_base(graft: Graft) -> None:
    """Exchange the trained base parameters, and modules that were replaced, with the originals.

    What comes in takes the device and the type of what goes out, since the model may have been moved meanwhile.
    """
    model = graft.model
    kept = own_trained(graft.backbone, graft.labels, graft.replaced) | set(graft.statistics)
    if kept and graft.originals is None:
        raise UserError(
            f"{graft.method} trains the backbone's own parameters and their original values were not kept; "
            "attach with keep_base=True to be able to disable the graft."
        )
    if not (kept or graft.replaced):
        return
    with unfolded(model):
        tensors = {**graft.parameters, **dict(model.named_buffers())}
        for name in kept:
            assert graft.originals is not None
            parameter, original = tensors[name], graft.originals[name]
            graft.originals[name] = parameter.data
            parameter.data = original.to(parameter)
        for name, other in graft.replaced.items():
            going = model.get_submodule(name)
            graft.replaced[name] = going
            model.set_submodule(name, _alike(other, going))
        torch.clear_autocast_cache()  # it holds casts of the values that were there
        settings = settings_of(model)
        set_settings(model, graft.settings)
        graft.settings = {name: settings[name] for name in graft.settings}


def _alike(module: nn.Module, other: nn.Module) -> nn.Module:
    """A module on the device, and in the floating-point type, of the one whose place it takes."""
    floating = next((p for p in other.parameters() if p.is_floating_point()), None)
    return module if floating is None else module.to(floating.device, floating.dtype)
