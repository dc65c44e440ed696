"""Attach a saved graft."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone, values
from graftkit.errors import UserError, listing
from graftkit.grafts.attach import attach_chain, detach
from graftkit.grafts.contents import stored_names
from graftkit.grafts.folder import read
from graftkit.grafts.graft import Graft
from graftkit.grafts.register import grafts_of
from graftkit.grafts.stored import Stored
from graftkit.methods.base import Chain
from graftkit.methods.base import read as read_method
from graftkit.recipe.catalogue import entries


def load(model: nn.Module | Backbone, path: str | Path, *, name: str = "default") -> Graft:
    """Attach the graft in folder `path` (written by `Graft.save` or by PEFT) to its backbone.

    Raises `UserError` if the graft belongs to another backbone, or if tensors are missing, unexpected or of the wrong
    shape.
    """
    stored = read(Path(path))
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    _refuse_other_backbone(path, stored, backbone)
    before, graft = backbone.missing, None
    backbone.missing = tuple(sorted({*before, *map(str, stored.about.get("missing", ()))}))
    try:
        graft = attach_chain(backbone, method_for(stored, backbone), name, stored=True)
        wanted = graft.tensors
        tensors = tensors_for(stored, graft)
        _refuse_misfits(path, backbone, wanted, tensors)
    except BaseException as error:
        if graft is not None:
            detach(graft)
        backbone.missing = before
        if isinstance(error, UserError) and str(path) not in str(error):
            raise UserError(f"the graft in {path} does not fit {backbone.source}: {error}") from None
        raise
    trained = {label for other in grafts_of(backbone.model).values() for label in other.labels}
    names = values.changed(backbone, stored.about.get(values.KEY), trained)
    if names:
        told = values.told(backbone.source, f"the graft in {path}", names)
        warnings.warn_explicit(told, values.OtherWeights, "graftkit", 1, module="graftkit.grafts.load")
    with torch.no_grad():
        for tensor_name, tensor in wanted.items():
            tensor.copy_(tensors[tensor_name])
    return graft


def begin_with(graft: Graft, path: Path, labels: Sequence[str]) -> None:
    """Initialise a new graft with the values of the one in `path`, a graft or run folder, to train it further.

    `labels`: the labels of the new graft. Raises `UserError` for another backbone, other labels, or a different
    method; learning rates and dropout may differ.
    """
    inside = path / "graft"
    folder = inside if inside.is_dir() else path
    stored = read(folder)
    _refuse_other_backbone(folder, stored, graft.backbone)
    known = tuple(stored.about.get("labels", labels))
    if known != tuple(labels):
        raise UserError(
            f"train.from: the graft in {folder} has the labels {listing(map(repr, known), 8) or '(none)'}, but the "
            f"training rows have {listing(map(repr, labels), 8) or 'none'}. Train on rows with the same labels, or "
            "start without train.from."
        )
    there, here = method_for(stored, graft.backbone), graft.method.stored()
    if _as_attached(there) != _as_attached(here):
        raise UserError(
            f"train.from: the graft in {folder} is {there}, and the recipe's method is {here}. Write the method of the graft "
            "(learning rates and dropout may differ), or start without train.from."
        )
    wanted, tensors = graft.tensors, tensors_for(stored, graft)
    _refuse_misfits(folder, graft.backbone, wanted, tensors)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def _as_attached(chain: Chain) -> list[str]:
    """Return the methods, sorted, with the options that matter only for training set to their defaults."""
    plain = []
    method: Any
    for method in chain.methods:
        fields = {
            field.name: field.default
            for field in dataclasses.fields(method)
            if field.name in ("lr", "dropout")
        }
        plain.append(str(dataclasses.replace(method, **fields)))
    return sorted(plain)


def _refuse_other_backbone(path: str | Path, stored: Stored, backbone: Backbone) -> None:
    if stored.fingerprint is not None and stored.fingerprint != backbone.fingerprint:
        raise UserError(
            f"the graft in {path} was trained on another backbone ({stored.backbone or 'unknown'}, fingerprint "
            f"{stored.fingerprint}); {backbone.source} has {backbone.fingerprint}. Load that backbone instead."
        )


def _refuse_misfits(
    path: str | Path, backbone: Backbone, wanted: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    missing, unexpected = set(wanted) - set(tensors), set(tensors) - set(wanted)
    if missing or unexpected:
        raise UserError(
            f"the graft in {path} does not fit {backbone.source}: "
            f"missing {listing(sorted(missing), 5) or 'nothing'}; unexpected {listing(sorted(unexpected), 5) or 'nothing'}."
        )
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(
                f"the graft in {path}: {name!r} has shape {tuple(tensors[name].shape)}, "
                f"but should have {tuple(parameter.shape)}."
            )
        kinds = [(t.dtype.is_floating_point, t.dtype.is_complex) for t in (tensors[name], parameter)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"the graft in {path}: {name!r} is stored as {tensors[name].dtype}, but should be {parameter.dtype}."
            )
        if tensors[name].isnan().any():
            raise UserError(f"the graft in {path}: {name!r} contains NaN values; restore it from a backup.")


def method_for(stored: Stored, backbone: Backbone) -> Chain:
    """Return the method; modules that PEFT saved become the backbone's own head, or are unfrozen."""
    chain = read_method(stored.method) if stored.method else Chain()  # empty for a task that trains nothing
    saved = {name: stored.tensors[name] for name in stored.saved}
    kinds = [entry.load() for entry in entries("method").values()] if saved else []
    for kind in sorted(kinds, key=lambda kind: not kind.gives_outputs):  # type: ignore[attr-defined]
        found = kind.from_saved_modules(backbone, saved)  # type: ignore[attr-defined]
        chain = chain + found if found is not None else chain
    return chain


def tensors_for(stored: Stored, graft: Graft) -> dict[str, Tensor]:
    """Return the tensors by the graft's parameter names on its backbone. Raises `UserError` if they do not fit."""
    names = {kept: name for name, kept in stored_names(graft).items()}
    tensors = graft.method.unpack(graft.backbone, dict(stored.tensors))
    return {names.get(kept, kept): tensor for kept, tensor in tensors.items()}
