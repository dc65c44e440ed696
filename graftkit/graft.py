"""A graft: what a method attached to a backbone. Made by `attach`, read back by `load`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.errors import UserError, listing
from graftkit.methods.base import Addition, Chain, Group, Labels, Method, as_chain
from graftkit.methods.head import Head


class Graft:
    """The trained parameters on one backbone, with what is needed to save, fold, silence or remove them.

    `labels`: parameter name -> `Group` for each parameter that is trained. `model`: the backbone's model,
    changed in place: called as before, it now computes with the graft.
    """

    def __init__(
        self, backbone: Backbone, method: Chain, labels: Labels, name: str, originals: dict[str, Tensor] | None
    ) -> None:
        self.backbone = backbone
        self.method = method
        self.labels = labels
        self.name = name
        self._originals = originals
        self._folded: dict[str, Tensor] | None = None
        self.active = True

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in model order."""
        return {name: p for name, p in self.model.named_parameters() if name in self.labels}

    def additions(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of each module that this graft added."""
        for name, module in self.model.named_modules():
            if name.rpartition(".")[2].endswith(f"_{self.name}") and hasattr(module, "active"):
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
        values: dict[str, Tensor] = {}
        for method in self.method.methods:
            for name, value in method.fold(self.backbone, self.name).items():
                if not torch.isfinite(value).all():
                    raise UserError(f"folding gives values in {name!r} that are not finite; nothing was changed.")
                values[name] = value
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

        return write(self, Path(path), about)

    def _set_active(self, active: bool, keep_head: bool = False) -> None:
        for _, module in self.additions():
            if not (keep_head and getattr(module, "survives_fold", False)):
                module.active = active  # type: ignore[assignment]
        self.active = active if not keep_head else self.active

    def _swap_base(self) -> None:
        """Exchange the trained base parameters with their original values."""
        trained = {n: p for n, p in self.parameters.items() if self.labels[n].role == "base"}
        if trained and self._originals is None:
            raise UserError(
                f"{self.method} trains the backbone's own parameters and their original values were not kept; "
                "attach with keep_base=True to be able to disable the graft."
            )
        for name, parameter in trained.items():
            assert self._originals is not None
            kept = self._originals[name]
            self._originals[name] = parameter.data
            parameter.data = kept.to(parameter.device)


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
    chain = as_chain(method)
    chain = Chain(tuple(m.resolve(backbone) if isinstance(m, Head) else m for m in chain.methods))
    backbone.base_parameters  # noqa: B018  (the names as they are before anything is added)
    try:
        labels = chain.attach(backbone, name)
        if not labels:
            raise UserError(f"{chain} trains nothing; add a method such as lora() or head().")
    except Exception:
        remove_additions(backbone.model, name)
        raise
    for parameter_name, parameter in backbone.model.named_parameters():
        trained = parameter_name in labels
        if trained and not parameter.dtype.is_floating_point:
            raise UserError(f"{parameter_name!r} is stored as {parameter.dtype} and cannot be trained; use lora().")
        parameter.requires_grad_(trained)
    originals = None
    if keep_base:
        originals = {
            n: p.detach().clone()
            for n, p in backbone.model.named_parameters()
            if n in labels and labels[n].role == "base" and not p.is_meta
        }
    return Graft(backbone, chain, labels, name, originals)


def remove_additions(model: nn.Module, name: str) -> None:
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if child_name.endswith(f"_{name}") and hasattr(child, "active"):
                for handle in getattr(child, "handles", []):
                    handle.remove()
                delattr(module, child_name)


def detach(graft: Graft) -> nn.Module:
    """Remove what the graft added and give the base its own values back; returns the plain model."""
    graft.unfold()
    if graft.active:
        graft.disable()
    remove_additions(graft.model, graft.name)
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
    graft = attach(backbone, stored.method_for(backbone), name=name)
    tensors = stored.tensors_for(graft)
    parameters = graft.parameters
    missing, unexpected = set(parameters) - set(tensors), set(tensors) - set(parameters)
    if missing or unexpected:
        raise UserError(
            f"the graft in {path} does not fit {backbone.source}: "
            f"missing {listing(sorted(missing), 5) or 'nothing'}; unexpected {listing(sorted(unexpected), 5) or 'nothing'}."
        )
    with torch.no_grad():
        for parameter_name, parameter in parameters.items():
            value = tensors[parameter_name]
            if value.shape != parameter.shape:
                raise UserError(
                    f"the graft in {path}: {parameter_name!r} has shape {tuple(value.shape)}, "
                    f"but {tuple(parameter.shape)} is needed."
                )
            parameter.copy_(value)
    return graft


def group_of(graft: Graft, name: str) -> Group:
    """The label of a parameter."""
    return graft.labels[name]


def with_classes(method: Chain, classes: int) -> Chain:
    """The method with the number of classes filled into its head."""
    return Chain(
        tuple(
            dataclasses.replace(m, classes=classes) if isinstance(m, Head) and m.classes is None else m
            for m in method.methods
        )
    )


__all__ = ["Addition", "Graft", "attach", "detach", "load"]
