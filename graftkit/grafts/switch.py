"""Switch a graft off and on by exchanging its trained values and modules with those of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from graftkit.backbone.walk import buffers_of
from graftkit.errors import UserError
from graftkit.grafts.fold import unfolded
from graftkit.grafts.guards import own_trained
from graftkit.grafts.snapshot import set_settings, settings_of

if TYPE_CHECKING:
    from graftkit.grafts.graft import Graft


def swap_base(graft: Graft) -> None:
    """Exchange the trained base parameters, and modules that were replaced, with the originals.

    Incoming tensors take the device and dtype of the outgoing ones, since the model may have been moved meanwhile.
    """
    model = graft.model
    kept = own_trained(graft.backbone, graft.labels, graft.replaced) | set(graft.statistics)
    if kept and graft.originals is None:
        raise UserError(
            f"{graft.method} trains the backbone's own parameters, and their original values were not kept; "
            "attach it with keep_base=True to be able to disable it."
        )
    if not (kept or graft.replaced):
        return
    with unfolded(model):
        tensors = {**graft.parameters, **buffers_of(model)}
        for name in kept:
            assert graft.originals is not None
            parameter, original = tensors[name], graft.originals[name]
            graft.originals[name] = parameter.data
            parameter.data = original.to(parameter)
        for name, other in graft.replaced.items():
            going = model.get_submodule(name)
            graft.replaced[name] = going
            model.set_submodule(name, _alike(other, going))
        torch.clear_autocast_cache()  # it holds casts of the previous values
        settings = settings_of(model)
        set_settings(model, graft.settings)
        graft.settings = {name: settings[name] for name in graft.settings}


def _alike(module: nn.Module, other: nn.Module) -> nn.Module:
    """Move a module to the device and floating-point dtype of the one that it replaces, and return it."""
    floating = next((p for p in other.parameters() if p.is_floating_point()), None)
    return module if floating is None else module.to(floating.device, floating.dtype)
