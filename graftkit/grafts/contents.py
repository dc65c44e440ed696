"""The contents of a graft's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftkit.backbone import values
from graftkit.backbone.anatomy import base_modules
from graftkit.grafts.stored import STORED_NAME, Contents
from graftkit.methods.base import PeftForm

if TYPE_CHECKING:
    from graftkit.grafts.graft import Graft


def contents_of(graft: Graft, about: dict[str, Any]) -> Contents:
    """Return the contents to write for an active graft that is not folded; `about` is added to the description."""
    with torch.no_grad():
        form = _peft_form(graft)
    description = {
        "method": str(graft.method.stored()),
        "backbone": graft.backbone.source,
        "fingerprint": graft.backbone.fingerprint,
        "missing": list(graft.backbone.missing),
        "trained_parameters": sum(p.numel() for p in graft.parameters.values()),
        values.KEY: values.sampled(graft.backbone, graft.labels),
        **about,
    }
    names = stored_names(graft)
    tensors = {names[name]: tensor for name, tensor in graft.tensors.items()}
    return Contents(tensors, form, description)


def stored_names(graft: Graft) -> dict[str, str]:
    """Return, for each of the graft's tensors, the name under which it is saved: as if the graft were called 'default'."""
    additions = {name for name, _ in graft.additions()}

    def stored(tensor: str) -> str:
        parts = tensor.split(".")
        outer = next((a for i in range(1, len(parts)) if (a := ".".join(parts[:i])) in additions), None)
        return tensor if outer is None else f"{outer[: -len(graft.name)]}{STORED_NAME}{tensor[len(outer) :]}"

    return {name: stored(name) for name in graft.tensors}


def _peft_form(graft: Graft) -> PeftForm | None:
    """Return the graft in PEFT's form; None if PEFT cannot express all of it, apart from a pooled head.

    PEFT can express one adapter, plus modules that are trained as a whole (`modules_to_save`).
    """
    forms = {
        method.name: form
        for method in graft.method.methods
        if (form := method.to_peft(graft.backbone, graft.name)) is not None
    }
    others = {
        n: p for n, p in graft.parameters.items()
        if graft.labels[n].role != "head" and graft.labels[n].method not in forms
    }  # fmt: skip
    if len(forms) != 1:
        return None
    form = next(iter(forms.values()))
    tensors = dict(form.tensors)
    if others and not _savable(graft, set(others), tensors):
        return None  # a part alone would load silently and give different outputs
    head = {n: p for n, p in graft.parameters.items() if n in graft.backbone.base_parameters}
    head = {n: p for n, p in head.items() if graft.labels[n].role == "head"}
    config = {
        **form.config,
        "base_model_name_or_path": graft.backbone.source,
        "task_type": _task_type(graft, bool(head)),
        "inference_mode": True,
    }
    if head or others:
        config["modules_to_save"] = sorted({*_wholes(graft, set(head)), *_wholes(graft, set(others))})
    # PEFT wraps the model once for adapters on modules, and not at all for virtual tokens
    wrapper = "base_model" if "prompt_embeddings" in tensors else "base_model.model"
    tensors |= {f"{wrapper}.{name}": parameter for name, parameter in (head | others).items()}
    return PeftForm(config, tensors)


def _savable(graft: Graft, names: set[str], adapter: dict[str, Tensor]) -> bool:
    """Return whether PEFT can save these base parameters beside an adapter, as copies of whole modules found by name."""
    if "prompt_embeddings" in adapter or graft.statistics or not names <= set(graft.backbone.base_parameters):
        return False
    wholes, parameters = _wholes(graft, names), graft.parameters
    modules = [name for name, _ in base_modules(graft.model)]
    owners: dict[int, int] = {}
    for _, parameter in graft.model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    inside = tuple(f"{name}." for name in wholes)
    return (
        all(wholes)
        and {name for name in graft.backbone.base_parameters if name.startswith(inside)} == names
        and all(owners[id(parameters[name])] == 1 for name in names)  # a copy would untie weights
        and not any(module.endswith(f".{name}") for module in modules for name in wholes)
        and not any(f"{name.removeprefix('base_model.model.')}.".startswith(inside) for name in adapter)
    )


def _wholes(graft: Graft, names: set[str]) -> list[str]:
    """Return the outermost modules whose base parameters are all in `names`: PEFT saves a head of several layers as one."""
    found = set()
    for name in names:
        owner = name.rpartition(".")[0]
        while outer := owner.rpartition(".")[0]:
            if not {n for n in graft.backbone.base_parameters if n.startswith(f"{outer}.")} <= names:
                break
            owner = outer
        found.add(owner)
    return sorted(found)


def _task_type(graft: Graft, head: bool) -> str | None:
    """Return the task type that selects PEFT's wrapper class; None for a user's own module."""
    if not hasattr(graft.model, "config"):
        return None
    if head:
        return "SEQ_CLS"
    if not getattr(graft.model, "can_generate", bool)():
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if graft.model.config.is_encoder_decoder else "CAUSAL_LM"  # type: ignore[union-attr]
