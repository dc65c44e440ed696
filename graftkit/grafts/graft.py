"""A graft: what a method attached to a backbone. Made by `attach`, read back by `load`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added, base_modules
from graftkit.errors import NotFoldable, UserError, listing
from graftkit.grafts.snapshot import (
    Before,
    KeepPadding,
    KeepStatistics,
    claim,
    folded_on,
    grafts_of,
    has_statistics,
    lone_places,
    moving_statistics,
    or_as_folded,
    own_trained,
    refuse_conflict,
    refuse_entangled,
    refuse_mixed,
    set_settings,
    settings_of,
    unfolded,
)
from graftkit.methods.base import Chain, Labels, Method, as_chain, place
from graftkit.methods.head import Head
from graftkit.optim.groups import make_optimizer, param_groups


@dataclasses.dataclass(frozen=True)
class PutAway:
    """The trained values of base parameters, new modules and settings of a disabled graft, by name."""

    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]
    settings: dict[str, Any]


class Graft:
    """The trained parameters on one backbone, with what is needed to save, fold, silence or remove them.

    `labels`: parameter name -> `Group` for each parameter that is trained. `model`: the backbone's model,
    changed in place: called as before, it now computes with the graft.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Chain,
        labels: Labels,
        name: str,
        originals: dict[str, Tensor] | None,
        before: Before,
    ) -> None:
        self.backbone = backbone
        self.method = method
        self.labels = labels
        self.name = name
        self._originals = originals
        self._before = before
        self._replaced = before.replaced(backbone.model)
        self._settings = before.changed_settings(backbone.model)
        self._folded: dict[str, Tensor] | None = None
        self.active = True
        self.statistics = tuple(dict.fromkeys(moving_statistics(backbone, labels)))

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in model order."""
        return {name: p for name, p in self.model.named_parameters() if name in self.labels}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a graft folder and a checkpoint hold, by name.

        The trained parameters; the running statistics that move with them; what its additions keep beside, as frozen
        parameters or persistent buffers.
        """
        tensors: dict[str, Tensor] = dict(self.parameters)
        buffers = dict(self.model.named_buffers())
        tensors |= {name: buffers[name] for name in self.statistics}
        for prefix, module in self.additions():
            tensors |= module.state_dict(prefix=f"{prefix}.", keep_vars=True)
        return tensors

    @property
    def state(self) -> dict[str, Tensor]:
        """`tensors`, and what its additions keep for training alone: all that a checkpoint holds, by name."""
        buffers = [
            (f"{prefix}.{name}", buffer)
            for prefix, module in self.additions()
            for name, buffer in module.named_buffers()
        ]
        return self.tensors | dict(buffers)

    def additions(self) -> Iterator[tuple[str, Added]]:
        """(name, module) of each module that this graft added."""
        for name, module in self.model.named_modules():
            if isinstance(module, Added) and module.graft == self.name:
                yield name, module

    def param_groups(self, lr: float | None = None, weight_decay: float = 0.01) -> list[dict[str, Any]]:
        """Groups for a torch optimizer, one for each combination of rate and decay.

        `lr` replaces the rate of every method whose options do not name one. Norms and biases (one
        dimension) are not decayed. `optimizer` makes one of them, which galore() needs.
        """
        return param_groups(self.parameters, self.labels, lr, weight_decay)

    def optimizer(self, lr: float | None = None, weight_decay: float = 0.01) -> torch.optim.Optimizer:
        """AdamW over `param_groups`, with whatever a method asks of it: galore() is in the optimizer alone."""
        return make_optimizer(self.param_groups(lr, weight_decay))

    def labels_at(self, step: int, epoch: float) -> Labels:
        """The labels of what is trained in a step (from 0) of an epoch (step / steps an epoch): all, for most methods.

        In a loop of your own all of them are trained from the first step on, unless only what is named here requires a
        gradient.
        """
        return self.method.labels_at(self.backbone, self.labels, step, epoch)

    def extra_loss(self) -> Tensor | None:
        """What the method adds to the task's loss in each step, a scalar; None for most methods."""
        return self.method.extra_loss(self.backbone, self.name)

    def after_step(self, step: int, steps: int) -> None:
        """To be called after each optimizer step in a loop of your own, before gradients are set to zero.

        `step` counts from 1 to `steps`, the length of the whole training. Methods that follow a schedule of their
        own, such as adalora, move on here; without the call they stay as they began.
        """
        self.method.after_step(self.backbone, self.name, step, steps)

    def requires_grad_(self, requires_grad: bool = True) -> Graft:
        """Let this graft be trained, and no other on its model; False freezes it. Returns the graft."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(requires_grad and name in self.labels)
        if requires_grad:
            for module in self.model.modules():
                if isinstance(module, KeepStatistics):
                    module.holds = module.graft == self.name
        return self

    def disable(self) -> None:
        """Make the model compute what the base computed, until `enable`. Trained values are kept."""
        if not self.active:
            return
        with unfolded(self.model, but=self) if self._folded is not None else nullcontext():
            self._swap_base()
            self._set_active(False)

    def enable(self) -> None:
        """Undo `disable`. Raises `UserError` beside an active graft that trains the same part of the base."""
        if self.active:
            return
        refuse_mixed(self.model)
        refuse_conflict(self.backbone, self.name, self.changes, self._replaced)
        self._swap_base()
        self._set_active(True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """`with graft.disabled(): ...` computes with the base."""
        self.disable()
        try:
            yield
        finally:
            self.enable()

    def fold(self) -> nn.Module:
        """Melt the graft into the plain weights and return the model. `unfold` restores the base bit for bit.

        A head stays on top. Raises `NotFoldable`, before anything is changed, where a method cannot be folded.
        """
        if self._folded is not None:
            return self.model
        self.enable()
        values: dict[str, Tensor] = {}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for method in self.method.methods:
            with torch.autocast(next(iter(parameters.values())).device.type, enabled=False):
                melted = method.fold(self.backbone, self.name)
            for name, value in melted.items():
                if not torch.isfinite(value).all():
                    raise UserError(
                        f"folding gives values in {name!r} that are not finite; nothing was changed."
                    )
                values[name] = values[name] + (value - parameters[name].data) if name in values else value
        self._refuse_shared(values)
        refuse_entangled(self.model, self.name)
        folded_on(self.model).append(self)
        self._folded = {}
        for name, value in values.items():
            self._folded[name] = parameters[name].data
            parameters[name].data = value
        torch.clear_autocast_cache()
        self._set_active(False, keep_head=True)
        return self.model

    def unfold(self) -> None:
        """Undo `fold`; what was folded later stays folded. Raises `NotFoldable`, with nothing changed, where it cannot."""
        if self._folded is None:
            return
        order = folded_on(self.model)
        later = order[order.index(self) + 1 :]
        with or_as_folded(self.model):
            for graft in reversed([self, *later]):
                graft._unfold()
            for graft in later:
                graft.fold()

    def _unfold(self) -> None:
        assert self._folded is not None
        folded_on(self.model).remove(self)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in self._folded.items():
            parameters[name].data = value
        torch.clear_autocast_cache()
        self._folded = None
        self._set_active(True)

    @property
    def changes(self) -> set[str]:
        """Names of the base's own tensors and modules that the graft puts its own in place of."""
        return (
            own_trained(self.backbone, self.labels, self._replaced)
            | set(self._replaced)
            | set(self.statistics)
            | lone_places(self.model, self.name)
        )

    @property
    def put_away(self) -> PutAway:
        """What a disabled graft would put in place of the base's own."""
        assert not self.active
        return PutAway(dict(self._originals or {}), dict(self._replaced), dict(self._settings))

    def save(self, path: str | Path, **about: Any) -> Path:
        """Write the graft folder: a PEFT adapter where PEFT can express it. See `graftkit.grafts.folder`."""
        from graftkit.grafts.folder import write

        was_active = self.active
        self.enable()
        try:
            with unfolded(self.model):
                return write(self, Path(path), about)
        finally:
            if not was_active:
                self.disable()

    def _set_active(self, active: bool, keep_head: bool = False) -> None:
        for _, module in self.additions():
            if not (keep_head and module.survives_fold):
                module.active = active
        self.active = active if not keep_head else self.active

    def _refuse_shared(self, values: dict[str, Tensor]) -> None:
        """A weight that two modules share cannot take an update that belongs to one of them."""
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        for names in owners.values():
            if len(names) > 1 and set(names) & set(values):
                raise NotFoldable(
                    f"{self.method} cannot be folded: {listing(names)} are one tied weight, and an update of "
                    "one of them would change the others. Untie them, or leave them out of the selection."
                )

    def _swap_base(self) -> None:
        """Exchange the trained base parameters, and modules that were replaced, with the originals."""
        kept = own_trained(self.backbone, self.labels, self._replaced) | set(self.statistics)
        if kept and self._originals is None:
            raise UserError(
                f"{self.method} trains the backbone's own parameters and their original values were not kept; "
                "attach with keep_base=True to be able to disable the graft."
            )
        if not (kept or self._replaced):
            return
        with unfolded(self.model):
            tensors = {**self.parameters, **dict(self.model.named_buffers())}
            for name in kept:
                assert self._originals is not None
                parameter, original = tensors[name], self._originals[name]
                self._originals[name] = parameter.data
                parameter.data = original.to(parameter.device)
            for name, other in self._replaced.items():
                self._replaced[name] = self.model.get_submodule(name)
                self.model.set_submodule(name, other)
            torch.clear_autocast_cache()  # it holds casts of the values that were there
            settings = settings_of(self.model)
            set_settings(self.model, self._settings)
            self._settings = {name: settings[name] for name in self._settings}


def attach(
    model: nn.Module | Backbone, method: Method | str, *, name: str = "default", keep_base: bool = True
) -> Graft:
    """Add a method's parameters to a model, in place, and freeze everything else.

    `method`: for example `LoRA(rank=8) + Head(classes=3)`, or the same as a string. `keep_base`: keep a copy
    of the base parameters that the method trains, which `disable` needs. Raises `UserError` where the method
    does not fit the model; the model is then as it was.
    """
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"graft name {name!r} must be a plain word (letters, digits, hyphens, underscores).")
    refuse_mixed(backbone.model)
    present = set(backbone.model.modules())
    others = grafts_of(backbone.model)
    if name in others:
        raise UserError(
            f"a graft named {name!r} is attached to {backbone.source} already; give this one another name, "
            "or detach that one first."
        )
    if folded_on(backbone.model):
        raise UserError(
            f"the graft {folded_on(backbone.model)[-1].name!r} is folded into {backbone.source}; unfold it first."
        )
    chain = as_chain(method)
    chain = Chain(tuple(m.resolve(backbone) for m in chain.methods))
    backbone.base_parameters  # noqa: B018  (the names as they are before anything is added)
    before = Before(backbone)
    try:
        labels = chain.attach(backbone, name)
        claim(backbone.model, present, name)
        _refuse_untrainable(backbone, chain, labels, before)
        replaced = before.replaced(backbone.model)
        statistics = set(moving_statistics(backbone, labels))
        own = own_trained(backbone, labels, replaced) | statistics
        refuse_conflict(backbone, name, own | set(replaced) | lone_places(backbone.model, name), replaced)
        for module_name, module in base_modules(backbone.model):
            if has_statistics(module) and f"{module_name}.running_mean".lstrip(".") not in statistics:
                place(module, f"statistics_{name}", KeepStatistics())
            if isinstance(module, nn.TransformerEncoder):
                place(module, f"padding_{name}", KeepPadding())
    except BaseException:
        claim(backbone.model, present, name)
        before.restore(backbone, name)
        raise
    claim(backbone.model, present, name)
    originals = None
    if keep_base:
        originals = {n: t.detach().clone() for n, t in _tensors(backbone.model) if n in own and not t.is_meta}
    graft = Graft(backbone, chain, labels, name, originals, before)
    others[name] = graft
    return graft.requires_grad_()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _refuse_untrainable(backbone: Backbone, chain: Chain, labels: Labels, before: Before) -> None:
    if not labels and chain.methods:
        raise UserError(f"{chain} trains nothing; add a method such as lora() or head().")
    new = tuple(f"{name}." for name in before.replaced(backbone.model))
    random = [
        n for n, _ in backbone.model.named_parameters() if new and n.startswith(new) and n not in labels
    ]
    if random:
        raise UserError(f"{listing(random)} are new and would stay random; leave them out of freeze().")
    for name, parameter in backbone.model.named_parameters():
        if name in labels and not parameter.dtype.is_floating_point:
            raise UserError(
                f"{labels[name].method}(): {name!r} is stored as {parameter.dtype} and cannot be trained; use lora()."
            )


def detach(graft: Graft) -> nn.Module:
    """Remove what the graft added and give the base its own values back; returns the plain model."""
    refuse_mixed(graft.model)
    graft.disable()
    graft._before.remove(graft)
    return graft.model


def with_classes(method: Chain, classes: int) -> Chain:
    """The method with the number of classes filled into its head."""
    return Chain(
        tuple(
            dataclasses.replace(m, classes=classes) if isinstance(m, Head) and m.classes is None else m
            for m in method.methods
        )
    )
