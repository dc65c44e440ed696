"""Fold a graft's update into the plain weights, and take it out again."""

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
    """Merge an active graft into the plain weights.

    Raises `NotFoldable`, before anything is changed, if a method cannot be folded.
    """
    values: dict[str, Tensor] = {}
    model = graft.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for method in graft.method.methods:
        with torch.autocast(next(iter(parameters.values())).device.type, enabled=False):
            folded = method.fold(graft.backbone, graft.name)
        for name, value in folded.items():
            if not torch.isfinite(value).all():
                raise UserError(f"folding gives non-finite values in {name!r}; nothing was changed.")
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
    """Return why the graft cannot be folded, as far as that is known before training: if a method never can be, or
    changes one of several modules that share a weight. None if no such reason is found.
    """
    never = next(filter(None, (method.never_folds() for method in graft.method.methods)), None)
    if never is not None:
        return never
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
    """Undo `fold`; grafts folded later stay folded. Raises `NotFoldable`, with nothing changed, if that is impossible."""
    order = folded_on(graft.model)
    later = order[order.index(graft) + 1 :]
    with _or_as_folded(graft.model):
        for other in reversed([graft, *later]):
            _unfold(other)
        for other in later:
            other.fold()


def _unfold(graft: Graft) -> None:
    """Restore the plain values, on the model's current device and in its current dtype."""
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
    """Restore the plain weights inside a `with` block; on exit all grafts but one are folded again."""
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
    """Restore the folded state of a model, with the same values, if the code inside fails."""
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
