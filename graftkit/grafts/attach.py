"""Add a method's parameters to a model, in place, and remove them again."""

from __future__ import annotations

import re

from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.sizes import SPARE_VALUES, Allowance
from graftkit.backbone.walk import buffers_of, modules_of, parameters_of
from graftkit.errors import UserError
from graftkit.grafts.graft import Graft
from graftkit.grafts.guards import lone_places, own_trained, refuse_conflict, refuse_mixed, refuse_untrainable
from graftkit.grafts.register import folded_on, grafts_of
from graftkit.grafts.snapshot import Snapshot, claim
from graftkit.grafts.still import hold_still, moving_statistics
from graftkit.methods.base import Chain, Method, as_chain


def attach(
    model: nn.Module | Backbone, method: Method | str, *, name: str = "default", keep_base: bool = True
) -> Graft:
    """Add a method's parameters to a model, in place, and freeze everything else.

    `method`: for example `LoRA(rank=8) + Head(classes=3)`, or the same as a string. `keep_base`: keep a copy
    of the base parameters that the method trains, which `disable` needs. The order in which a sum is written does not
    matter. Raises `UserError` if the method does not fit the model, and then leaves the model unchanged.
    """
    return attach_chain(model, as_chain(method).arranged(), name, keep_base=keep_base)


def attach_chain(
    model: nn.Module | Backbone, chain: Chain, name: str, *, keep_base: bool = True, stored: bool = False
) -> Graft:
    """Attach methods in the given order. `stored`: they come from a saved graft, so skip newer checks of sums."""
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"graft name {name!r} must be a plain word (letters, digits, hyphens, underscores).")
    refuse_mixed(backbone.model)
    present = set(modules_of(backbone.model).values())
    others = grafts_of(backbone.model)
    if name in others:
        raise UserError(
            f"a graft named {name!r} is already attached to {backbone.source}; give this one another name, "
            "or detach that one first."
        )
    if folded_on(backbone.model):
        raise UserError(
            f"the graft {folded_on(backbone.model)[-1].name!r} is folded into {backbone.source}; unfold it first."
        )
    chain = Chain(tuple(m.resolve(backbone) for m in chain.methods))
    backbone.base_parameters  # noqa: B018  (cache the names before anything is added)
    snapshot = Snapshot(backbone)
    try:
        with _allowance(backbone):
            labels = chain.attach(backbone, name, stored)
        claim(backbone.model, present, name)
        replaced = snapshot.replaced(backbone.model)
        refuse_untrainable(backbone, chain, labels, replaced)
        statistics = set(moving_statistics(backbone, labels))
        own = own_trained(backbone, labels, replaced) | statistics
        refuse_conflict(backbone, name, own | set(replaced) | lone_places(backbone.model, name), replaced)
        hold_still(backbone.model, name, statistics)
    except BaseException:
        claim(backbone.model, present, name)
        snapshot.restore(backbone, name)
        raise
    claim(backbone.model, present, name)
    originals = None
    if keep_base:
        originals = {n: t.detach().clone() for n, t in _tensors(backbone.model) if n in own and not t.is_meta}
    graft = Graft(backbone, chain, labels, name, originals, snapshot)
    others[name] = graft
    return graft.requires_grad_()


def _allowance(backbone: Backbone) -> Allowance:
    """Return how much a method may add to a backbone: a number too many in its options must not fill the memory."""
    own = sum(parameter.numel() for parameter in parameters_of(backbone.model).values())
    most = SPARE_VALUES + 8 * own

    def refuse(shape: tuple[int, ...]) -> UserError:
        return UserError(
            f"with a tensor of shape {shape} the method would add more than {most:,} values to {backbone.source}, which "
            f"has {own:,}; choose smaller options."
        )

    return Allowance(10**6, most, refuse)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*parameters_of(model).items(), *buffers_of(model).items()]


def detach(graft: Graft) -> nn.Module:
    """Remove a graft from its model and restore the base's own values. Return the plain model."""
    refuse_mixed(graft.model)
    graft.disable()
    graft.snapshot.remove(graft)
    return graft.model
