"""Folding: a graft's update added to the plain weights, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftkit.errors import NotFoldable, UserError
from graftkit.grafts.guards import refuse_entangled, refuse_shared
from graftkit.grafts.register import folded_on

if TYPE_CHECKING:
    from graftkit.grafts.graft import Graft


def fold(graft: Graft) -> None:
    """Melt an active graft into the plain weights.

    Raises `NotFoldable`, before anything is changed, where a method cannot be folded.
    """
    values: dict[str, Tensor] = {}
    model = graft.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for method in graft.method.methods:
        with torch.autocast(next(iter(parameters.values())).device.type, enabled=False):
            folded = method.fold(graft.backbone, graft.name)
        for name, value in folded.items():
            if not torch.isfinite(value).all():
                raise UserError(f"folding gives values in {name!r} that are not finite; nothing was changed.")
            values[name] = values[name] + (value - parameters[name].data) if name in values else value
    refuse_shared(model, graft.method, values)
    refuse_entangled(model, graft.name)
    folded_on(model).append(graft)
    graft.plain = {}
    for name, value in values.items():
        graft.plain[name] = parameters[name].data
        parameters[name].data = value
    torch.clear_autocast_cache()
    graft.set_active(False, keep_head=True)


def why_not(graft: Graft) -> str | None:
    """Why the graft cannot be folded, as far as its places tell before anything is trained: where it changes one of
    several modules that share a weight. None where nothing of the kind is in the way.
    """
    owners = {name.rpartition(".")[0] for name, module in graft.additions() if not module.survives_fold}
    names = [name for name, _ in graft.model.named_parameters(remove_duplicate=False)]
    try:
        refuse_shared(
            graft.model, graft.method, [name for name in names if name.rpartition(".")[0] in owners]
        )
    except NotFoldable as error:
        return str(error)
    return None


def unfold(graft: Graft) -> None:
    """Undo `fold`; what was folded later stays folded. Raises `NotFoldable`, with nothing changed, where it cannot."""
    order = folded_on(graft.model)
    later = order[order.index(graft) + 1 :]
    with _or_as_folded(graft.model):
        for other in reversed([graft, *later]):
            _unfold(other)
        for other in later:
            other.fold()


def _unfold(graft: Graft) -> None:
    """Put the plain values back, on the device and in the type that the model has now."""
    assert graft.plain is not None
    folded_on(graft.model).remove(graft)
    parameters = dict(graft.model.named_parameters(remove_duplicate=False))
    for name, value in graft.plain.items():
        parameters[name].data = value.to(parameters[name])
    torch.clear_autocast_cache()
    graft.plain = None
    graft.set_active(True)


@contextmanager
def unfolded(model: nn.Module, but: Graft | None = None) -> Iterator[None]:
    """The plain weights are in their places inside; what was folded, but for one graft, is folded again afterwards."""
    order = list(folded_on(model))
    for graft in reversed(order):
        _unfold(graft)
    try:
        yield
    finally:
        for graft in order:
            if graft is not but:
                graft.fold()


@contextmanager
def _or_as_folded(model: nn.Module) -> Iterator[None]:
    """Fold the grafts of a model again, to the same values, where what is done inside fails."""
    order = list(folded_on(model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = {name: parameters[name].data for graft in order for name in graft.plain or ()}
    kept = [graft.plain for graft in order]
    try:
        yield
    except BaseException:
        for name, value in values.items():
            parameters[name].data = value
        for graft, plain in zip(order, kept):
            graft.plain = plain
            graft.set_active(False, keep_head=True)
        folded_on(model)[:] = order
        raise
