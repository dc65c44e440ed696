"""A graft: what a method attached to a backbone. Made by `attach`, read back by `load`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added, base_modules
from graftkit.backbone.attention import release
from graftkit.errors import NotFoldable, UserError, listing
from graftkit.methods.base import Chain, Labels, Method, as_chain
from graftkit.methods.head import Head


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
        self._folded: dict[str, Tensor] | None = None
        self.active = True

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in model order."""
        return {name: p for name, p in self.model.named_parameters() if name in self.labels}

    def additions(self) -> Iterator[tuple[str, Added]]:
        """(name, module) of each module that this graft added."""
        for name, module in self.model.named_modules():
            if isinstance(module, Added) and module.graft == self.name:
                yield name, module

    def param_groups(self, lr: float | None = None, weight_decay: float = 0.01) -> list[dict[str, Any]]:
        """Groups for a torch optimizer, one for each combination of rate and decay.

        `lr` replaces the rate of every method whose options do not name one. Norms and biases (one
        dimension) are not decayed.
        """
        from graftkit.optim.groups import param_groups

        return param_groups(self.parameters, self.labels, lr, weight_decay)

    def disable(self) -> None:
        """Make the model compute what the base computed, until `enable`. Trained values are kept."""
        if not self.active:
            return
        self.unfold()
        self._swap_base()
        self._set_active(False)

    def enable(self) -> None:
        """Undo `disable`."""
        if self.active:
            return
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
        for method in self.method.methods:
            for name, value in method.fold(self.backbone, self.name).items():
                if not torch.isfinite(value).all():
                    raise UserError(
                        f"folding gives values in {name!r} that are not finite; nothing was changed."
                    )
                values[name] = value
        self._refuse_shared(values)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._folded = {}
        for name, value in values.items():
            self._folded[name] = parameters[name].data
            parameters[name].data = value
        self._set_active(False, keep_head=True)
        return self.model

    def unfold(self) -> None:
        """Undo `fold`."""
        if self._folded is None:
            return
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in self._folded.items():
            parameters[name].data = value
        self._folded = None
        self._set_active(True)

    def save(self, path: str | Path, **about: Any) -> Path:
        """Write the graft folder: a PEFT adapter where PEFT can express it. See `graftkit.graft_files`."""
        from graftkit.graft_files import write

        if self.active:
            return write(self, Path(path), about)
        self.enable()
        try:
            return write(self, Path(path), about)
        finally:
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
        kept = _own_trained(self.backbone, self.labels, self._replaced)
        if kept and self._originals is None:
            raise UserError(
                f"{self.method} trains the backbone's own parameters and their original values were not kept; "
                "attach with keep_base=True to be able to disable the graft."
            )
        parameters = self.parameters
        for name in kept:
            assert self._originals is not None
            parameter, original = parameters[name], self._originals[name]
            self._originals[name] = parameter.data
            parameter.data = original.to(parameter.device)
        for name, other in self._replaced.items():
            self._replaced[name] = self.model.get_submodule(name)
            self.model.set_submodule(name, other)


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

    def restore(self, backbone: Backbone, graft: str) -> None:
        """Remove what a graft added and put back what it replaced."""
        model = backbone.model
        backbone.sites = self.sites
        remove_additions(model, graft)
        for name, module in self.replaced(model).items():
            model.set_submodule(name, module)
        alone = not any(isinstance(module, Added) for module in model.modules())
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


def attach(
    model: nn.Module | Backbone, method: Method | str, *, name: str = "default", keep_base: bool = True
) -> Graft:
    """Add a method's parameters to a model, in place, and freeze everything else.

    `method`: for example `LoRA(rank=8) + Head(classes=3)`, or the same as a string. `keep_base`: keep a copy
    of the base parameters that the method trains, which `disable` needs. Raises `UserError` where the method
    does not fit the model; the model is then as it was.
    """
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    if not name.isidentifier():
        raise UserError(f"graft name {name!r} must be a plain word (letters, digits, underscores).")
    present = set(backbone.model.modules())
    if any(isinstance(module, Added) and module.graft == name for module in present):
        raise UserError(
            f"a graft named {name!r} is attached to {backbone.source} already; give this one another name, "
            "or detach that one first."
        )
    chain = as_chain(method)
    chain = Chain(tuple(m.resolve(backbone) if isinstance(m, Head) else m for m in chain.methods))
    backbone.base_parameters  # noqa: B018  (the names as they are before anything is added)
    before = Before(backbone)
    try:
        labels = chain.attach(backbone, name)
        _refuse_untrainable(backbone, chain, labels, before)
    except BaseException:
        _claim(backbone.model, present, name)
        before.restore(backbone, name)
        raise
    _claim(backbone.model, present, name)
    for parameter_name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(parameter_name in labels)
    originals = None
    if keep_base:
        own = _own_trained(backbone, labels, before.replaced(backbone.model))
        originals = {
            n: p.detach().clone() for n, p in backbone.model.named_parameters() if n in own and not p.is_meta
        }
    return Graft(backbone, chain, labels, name, originals, before)


def _claim(model: nn.Module, present: set[nn.Module], name: str) -> None:
    """Write the graft's name on the modules that were not there before."""
    for module in model.modules():
        if isinstance(module, Added) and module not in present:
            module.graft = name


def _refuse_untrainable(backbone: Backbone, chain: Chain, labels: Labels, before: Before) -> None:
    if not labels:
        raise UserError(f"{chain} trains nothing; add a method such as lora() or head().")
    new = tuple(f"{name}." for name in before.replaced(backbone.model))
    random = [
        n for n, _ in backbone.model.named_parameters() if new and n.startswith(new) and n not in labels
    ]
    if random:
        raise UserError(f"{listing(random)} are new and would stay random; leave them out of freeze().")
    for name, parameter in backbone.model.named_parameters():
        if name in labels and not parameter.dtype.is_floating_point:
            raise UserError(f"{name!r} is stored as {parameter.dtype} and cannot be trained; use lora().")


def _own_trained(backbone: Backbone, labels: Labels, replaced: dict[str, nn.Module]) -> set[str]:
    """The base's own parameters that are trained in place, its own head's among them."""
    return {
        name
        for name in labels
        if name in backbone.base_parameters and not any(name.startswith(f"{module}.") for module in replaced)
    }


def remove_additions(model: nn.Module, name: str) -> None:
    """Delete the modules of the graft of that name, and their hooks."""
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, Added) and child.graft == name:
                for handle in getattr(child, "handles", []):
                    handle.remove()
                delattr(module, child_name)


def detach(graft: Graft) -> nn.Module:
    """Remove what the graft added and give the base its own values back; returns the plain model."""
    graft.disable()
    graft._before.restore(graft.backbone, graft.name)
    return graft.model


def load(model: nn.Module | Backbone, path: str | Path, *, name: str = "default") -> Graft:
    """Attach the graft in folder `path` (written by `Graft.save` or by PEFT) to its backbone.

    Raises `UserError` for another backbone, for missing, unexpected or misshapen tensors.
    """
    from graftkit.graft_files import read

    stored = read(Path(path))
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    if stored.fingerprint is not None and stored.fingerprint != backbone.fingerprint:
        raise UserError(
            f"the graft in {path} was trained on another backbone ({stored.backbone or 'unknown'}, fingerprint "
            f"{stored.fingerprint}); {backbone.source} has {backbone.fingerprint}. Load that backbone instead."
        )
    backbone.missing = tuple(sorted({*backbone.missing, *map(str, stored.about.get("missing", ()))}))
    graft = attach(backbone, stored.method_for(backbone), name=name)
    tensors = stored.tensors_for(graft)
    parameters = graft.parameters
    try:
        _refuse_misfits(path, backbone, parameters, tensors)
    except UserError:
        detach(graft)
        raise
    with torch.no_grad():
        for parameter_name, parameter in parameters.items():
            parameter.copy_(tensors[parameter_name])
    return graft


def _refuse_misfits(
    path: str | Path, backbone: Backbone, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    missing, unexpected = set(parameters) - set(tensors), set(tensors) - set(parameters)
    if missing or unexpected:
        raise UserError(
            f"the graft in {path} does not fit {backbone.source}: "
            f"missing {listing(sorted(missing), 5) or 'nothing'}; unexpected {listing(sorted(unexpected), 5) or 'nothing'}."
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(
                f"the graft in {path}: {name!r} has shape {tuple(tensors[name].shape)}, "
                f"but {tuple(parameter.shape)} is needed."
            )


def with_classes(method: Chain, classes: int) -> Chain:
    """The method with the number of classes filled into its head."""
    return Chain(
        tuple(
            dataclasses.replace(m, classes=classes) if isinstance(m, Head) and m.classes is None else m
            for m in method.methods
        )
    )
