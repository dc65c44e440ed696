"""Refuse conflicts between grafts on one model, before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from torch import nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added
from graftkit.backbone.walk import modules_of, parameters_of
from graftkit.errors import NotFoldable, UserError, listing
from graftkit.grafts.register import MIXED, grafts_of
from graftkit.methods.base import Addition, Method
from graftkit.methods.shared.advice import general
from graftkit.optim.labels import Labels

if TYPE_CHECKING:
    from graftkit.grafts.graft import Graft


def refuse_mixed(model: nn.Module) -> None:
    """Raise `UserError` while grafts are mixed."""
    if vars(model).get(MIXED) is not None:
        raise UserError(
            f"the grafts of {type(model).__name__} are currently mixed by graftkit.using; leave the with block before "
            "you attach, detach, enable, fold or save one."
        )


def refuse_conflict(backbone: Backbone, name: str, changes: set[str], replaced: dict[str, nn.Module]) -> None:
    """Raise `UserError` if another active graft replaces the same part of the base."""
    others = [graft for graft in grafts_of(backbone.model).values() if graft.active and graft.name != name]
    for other in others:
        shared = sorted(changes & other.changes)
        if shared:
            raise UserError(
                f"the grafts {name!r} and {other.name!r} both change {listing(shared, 3)} of {backbone.source}, so only "
                f"one of them can be active: disable {other.name!r} first, or detach it."
            )
    refuse_lost(backbone.model, name, replaced, others)


def refuse_lost(model: nn.Module, name: str, replaced: dict[str, nn.Module], others: Iterable[Graft]) -> None:
    """Raise `UserError` if a graft adds to a module that another one replaces: the addition would not be called."""
    for other in others:
        pairs = [(other.name, name, *item) for item in replaced.items()]
        pairs += [(name, other.name, *item) for item in other.replaced.items()]
        for adding, replacing, place, held in pairs:
            parts = [*modules_of(held).values(), *model.get_submodule(place).modules()]
            if other.name != name and any(
                isinstance(part, Added) and part.graft == adding and part.changes_outputs for part in parts
            ):
                raise UserError(
                    f"the graft {adding!r} adds to {place!r}, which the graft {replacing!r} replaces by its own module, so "
                    f"only one of them can be active: disable {other.name!r} first, or detach it."
                )


def refuse_entangled(model: nn.Module, graft: str) -> None:
    """Raise `NotFoldable` if a graft cannot be folded into a module independently of other additions there.

    Sums are independent, and an addition attached later still acts on the module's new output. One attached earlier
    acted on the old output, and one beside a change of the input read the changed input.
    """
    for name, site in modules_of(model).items():
        acting = [
            child
            for child in site.children()
            if isinstance(child, Addition)
            and child.active
            and child.changes_outputs
            and not child.survives_fold
        ]
        for i, own in enumerate(acting):
            if own.graft != graft:
                continue
            at_output = type(own).before is Addition.before
            for j, other in enumerate(acting):
                same = other.graft == graft and type(other) is type(own)
                behind = j > i and other.graft != graft and at_output
                if not (same or behind or (own.adds and other.adds)):
                    owner = "the same graft" if other.graft == graft else f"the graft {other.graft!r}"
                    raise NotFoldable(
                        f"{type(own).__name__} of the graft {graft!r} cannot be folded into {name!r} without "
                        f"{type(other).__name__} of {owner}, which acts there too. Keep the graft folder, or fold the "
                        "first graft before the other is attached."
                    )


def own_trained(backbone: Backbone, labels: Labels, replaced: dict[str, nn.Module]) -> set[str]:
    """Return the base's own parameters that are trained in place, including those of its own head."""
    return {
        name
        for name in labels
        if name in backbone.base_parameters and not any(name.startswith(f"{module}.") for module in replaced)
    }


def lone_places(model: nn.Module, graft: str) -> set[str]:
    """Return names, for messages, of the places where a graft has an addition that allows no other beside it."""
    return {
        f"the output of {name.rpartition('.')[0] or type(model).__name__}"
        for name, module in modules_of(model).items()
        if isinstance(module, Added) and module.graft == graft and module.lone
    }


def refuse_shared(model: nn.Module, method: Method, changed: Collection[str]) -> None:
    """Raise `NotFoldable` for an update of one of several modules that share a weight."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        if len(names) > 1 and set(names) & set(changed):
            raise NotFoldable(
                f"{method} cannot be folded: {listing(names)} are one tied weight, and an update of "
                "one of them would change the others. Untie them, or leave them out of the selection."
            )


def refuse_untrainable(backbone: Backbone, method: Method, labels: Labels, replaced: Collection[str]) -> None:
    if not labels and str(method):
        raise UserError(f"{method} trains nothing; add a method such as {general()}.")
    new = tuple(f"{name}." for name in replaced)
    random = [n for n in parameters_of(backbone.model) if new and n.startswith(new) and n not in labels]
    if random:
        raise UserError(f"{listing(random)} are new and would stay random; do not freeze them.")
    for name, parameter in parameters_of(backbone.model).items():
        if name in labels and not parameter.dtype.is_floating_point:
            raise UserError(
                f"{labels[name].method}(): {name!r} is stored as {parameter.dtype} and cannot be trained; use {general()}."
            )
