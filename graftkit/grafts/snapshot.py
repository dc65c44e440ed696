"""A model as it was before a graft, and which grafts are on it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added, base_modules
from graftkit.backbone.attention import release
from graftkit.errors import NotFoldable, UserError, listing
from graftkit.methods.base import Addition, Labels

if TYPE_CHECKING:
    from graftkit.grafts.graft import Graft

REGISTER, FOLDED, MIXED = "graftkit_grafts", "graftkit_folded", "graftkit_mixed"
CONFIG_SETTINGS = ("id2label", "label2id", "_attn_implementation")
MODEL_SETTINGS = ("num_labels", "accepts_loss_kwargs")


def grafts_of(model: nn.Module) -> dict[str, Graft]:
    """The grafts that are attached to a model, by name, in the order of their attachment."""
    return vars(model).setdefault(REGISTER, {})


def folded_on(model: nn.Module) -> list[Graft]:
    """The grafts that are folded into a model, in the order in which that was done."""
    return vars(model).setdefault(FOLDED, [])


@contextmanager
def unfolded(model: nn.Module, but: Graft | None = None) -> Iterator[None]:
    """The plain weights are in their places inside; what was folded into them, but for one, is folded again afterwards."""
    order = list(folded_on(model))
    for graft in reversed(order):
        graft._unfold()
    try:
        yield
    finally:
        for graft in order:
            if graft is not but:
                graft.fold()


def refuse_mixed(model: nn.Module) -> None:
    """Raise `UserError` where grafts are mixed at the moment."""
    if vars(model).get(MIXED) is not None:
        raise UserError(
            f"the grafts of {type(model).__name__} are mixed by graftkit.using at the moment; leave the with block before "
            "you attach, detach, enable, fold or save one."
        )


def refuse_conflict(backbone: Backbone, name: str, changes: set[str], replaced: dict[str, nn.Module]) -> None:
    """Raise `UserError` where another active graft puts its own in place of the same part of the base."""
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
    """Raise `UserError` where a graft adds to a module that another one replaces: the addition would not be called."""
    for other in others:
        pairs = [(other.name, name, *item) for item in replaced.items()]
        pairs += [(name, other.name, *item) for item in other._replaced.items()]
        for adding, replacing, place, held in pairs:
            parts = [*held.modules(), *model.get_submodule(place).modules()]
            if other.name != name and any(
                isinstance(part, Added) and part.graft == adding and part.changes_outputs for part in parts
            ):
                raise UserError(
                    f"the graft {adding!r} adds to {place!r}, in the place of which the graft {replacing!r} puts a module of "
                    f"its own, so only one of them can be active: disable {other.name!r} first, or detach it."
                )


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


def refuse_entangled(model: nn.Module, graft: str) -> None:
    """Raise `NotFoldable` where a graft cannot be melted into a module apart from what else acts there.

    Sums can be taken apart, and what was added later goes on acting on the module's new output. What was added before
    acted on the old one, and what acts beside a change of the input saw that too.
    """
    for name, site in model.named_modules():
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
                        f"{type(own).__name__} of the graft {graft!r} cannot be folded into {name!r} apart from "
                        f"{type(other).__name__} of {owner}, which acts there too. Keep the graft folder, or fold what "
                        "was attached first before the other is attached."
                    )


@contextmanager
def or_as_folded(model: nn.Module) -> Iterator[None]:
    """Fold the grafts of a model again, to the same values, where what is done inside fails."""
    order = list(folded_on(model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = {name: parameters[name].data for graft in order for name in graft._folded or ()}
    kept = [graft._folded for graft in order]
    try:
        yield
    except BaseException:
        for name, value in values.items():
            parameters[name].data = value
        for graft, folded in zip(order, kept):
            graft._folded = folded
            graft._set_active(False, keep_head=True)
        folded_on(model)[:] = order
        raise


def has_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics of what passes through it, as BatchNorm does."""
    return getattr(module, "running_mean", None) is not None


def moving_statistics(backbone: Backbone, labels: Labels) -> Iterator[str]:
    """Names of the running statistics that move while the parameters beside them are trained."""
    for name, group in labels.items():
        owner = name.rpartition(".")[0]
        module = backbone.module(owner)
        if group.statistics and has_statistics(module):
            for buffer, _ in module.named_buffers(recurse=False):
                yield f"{owner}.{buffer}".lstrip(".")


def own_trained(backbone: Backbone, labels: Labels, replaced: dict[str, nn.Module]) -> set[str]:
    """The base's own parameters that are trained in place, its own head's among them."""
    return {
        name
        for name in labels
        if name in backbone.base_parameters and not any(name.startswith(f"{module}.") for module in replaced)
    }


def lone_places(model: nn.Module, graft: str) -> set[str]:
    """What messages call the places where a graft has an addition beside which there can be no other."""
    return {
        f"the output of {name.rpartition('.')[0] or type(model).__name__}"
        for name, module in model.named_modules()
        if isinstance(module, Added) and module.graft == graft and module.lone
    }


class Before:
    """A model as it was before `attach`, so that it can be made so again."""

    def __init__(self, backbone: Backbone) -> None:
        model = backbone.model
        first = next(iter(grafts_of(model).values()), None)
        self.sites = backbone.sites
        self.modules = dict(base_modules(model))
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        # of the base alone, whichever graft is the last to leave
        self.base_requires_grad: dict[str, bool] = (
            first._before.base_requires_grad if first else self.requires_grad
        )
        self.settings = settings_of(model)
        self.attention: str | None = (
            first._before.attention if first else self.settings.get("_attn_implementation")
        )

    def replaced(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that are no longer in their places, by name."""
        now = dict(model.named_modules())
        return {name: module for name, module in self.modules.items() if now.get(name) is not module}

    def changed_settings(self, model: nn.Module) -> dict[str, Any]:
        """The settings that are no longer what they were, as they were."""
        now = settings_of(model)
        return {
            name: value
            for name, value in self.settings.items()
            if name != "_attn_implementation" and now.get(name) != value
        }

    def restore(self, backbone: Backbone, graft: str) -> None:
        """Make the model as it was, after an `attach` that failed."""
        model = backbone.model
        remove_additions(model, graft)
        for name, module in self.replaced(model).items():
            model.set_submodule(name, module)
        set_settings(model, self.changed_settings(model))
        for name, parameter in model.named_parameters():
            if name in self.requires_grad:
                parameter.requires_grad_(self.requires_grad[name])
        backbone.sites = self.sites
        release(model, self.settings.get("_attn_implementation"))

    def remove(self, graft: Graft) -> None:
        """Take a disabled graft off the model; with the last one, the base can be trained as before."""
        model, backbone = graft.model, graft.backbone
        others = grafts_of(model)
        others.pop(graft.name, None)
        remove_additions(model, graft.name)
        for other in others.values():  # what it put another module in the place of has the graft's too
            for module in other._replaced.values():
                remove_additions(module, graft.name)
        backbone.sites = tuple(
            dataclasses.replace(site, module=backbone.module(site.name)) for site in self.sites
        )
        is_trained = not any(all(p.requires_grad for p in o.parameters.values()) for o in others.values())
        for name, parameter in model.named_parameters():
            if not others and name in self.base_requires_grad:
                parameter.requires_grad_(self.base_requires_grad[name])
            elif is_trained and name in graft.labels:  # beside other grafts, the base stays frozen
                parameter.requires_grad_(False)
        release(model, self.attention)


def settings_of(model: nn.Module) -> dict[str, Any]:
    """What a new head writes on a model beside its modules."""
    config = getattr(model, "config", None)
    settings = {name: copy.copy(getattr(config, name)) for name in CONFIG_SETTINGS if hasattr(config, name)}
    return settings | {name: vars(model).get(name) for name in MODEL_SETTINGS}


def set_settings(model: nn.Module, settings: dict[str, Any]) -> None:
    """Write settings on a model; None for one of the model's own takes it away."""
    for name, value in settings.items():
        if name in CONFIG_SETTINGS:
            setattr(model.config, name, value)
        elif value is None:
            vars(model).pop(name, None)
        else:
            setattr(model, name, value)


def claim(model: nn.Module, present: set[nn.Module], name: str) -> None:
    """Write the graft's name on the modules that were not there before."""
    for module in model.modules():
        if isinstance(module, Added) and module not in present:
            module.graft = name


def remove_additions(model: nn.Module, name: str) -> None:
    """Delete the modules of the graft of that name, and their hooks."""
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, Added) and child.graft == name:
                for handle in getattr(child, "handles", []):
                    handle.remove()
                delattr(module, child_name)
