"""The graft folder.

adapter_config.json, adapter_model.safetensors   a PEFT adapter, where PEFT can express a part of the graft
graft.safetensors                                 every tensor of the graft that is not in the PEFT file
graft.json                                        the method, the backbone's fingerprint, and for each
                                                  tensor of it the file and key that hold it
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import base_modules, is_linear
from graftkit.errors import UserError, listing
from graftkit.files import read_json, read_tensors, write_json, write_tensors
from graftkit.grafts.graft import Graft, attach, detach
from graftkit.methods.base import Chain, PeftForm
from graftkit.methods.base import read as read_method

FORMAT = 1
STORED_NAME = "default"
PEFT_CONFIG, PEFT_TENSORS, OWN_TENSORS, DESCRIPTION = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "graft.safetensors",
    "graft.json",
)


def write(graft: Graft, folder: Path, about: dict[str, Any]) -> Path:
    """Write the folder; each file is replaced atomically, the description last."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder for the graft.")
    with torch.no_grad():
        form = _peft_form(graft)
    description = {
        "method": str(graft.method.stored()),
        "backbone": graft.backbone.source,
        "fingerprint": graft.backbone.fingerprint,
        "missing": list(graft.backbone.missing),
        "trained_parameters": sum(p.numel() for p in graft.parameters.values()),
        **about,
    }
    tensors = {stored_name(graft, name): tensor for name, tensor in graft.tensors.items()}
    return write_contents(folder, tensors, form, description)


def write_contents(
    folder: Path, tensors: dict[str, Tensor], form: PeftForm | None, description: dict[str, Any] | None
) -> Path:
    """Write tensors by the names they are stored under: those of `form` to its file, the others beside it.

    Without a description, the folder is PEFT's alone.
    """
    where: dict[str, dict[str, str]] = {}
    own: dict[str, Tensor] = {}
    keys = {id(tensor): key for key, tensor in form.tensors.items()} if form else {}
    for name, tensor in tensors.items():
        if id(tensor) in keys:
            where[name] = {"file": PEFT_TENSORS, "key": keys[id(tensor)]}
        else:
            where[name] = {"file": OWN_TENSORS, "key": name}
            own[name] = tensor
    if form is not None:
        write_tensors(folder / PEFT_TENSORS, form.tensors)
        write_json(folder / PEFT_CONFIG, form.config)
    if own:
        write_tensors(folder / OWN_TENSORS, own)
    if description is not None:
        write_json(folder / DESCRIPTION, {"format": FORMAT, **description, "tensors": where})
    used = ((PEFT_CONFIG, form), (PEFT_TENSORS, form), (OWN_TENSORS, own), (DESCRIPTION, description))
    for name, is_used in used:
        if not is_used:  # of an earlier graft in this folder
            (folder / name).unlink(missing_ok=True)
    return folder


def stored_name(graft: Graft, parameter: str) -> str:
    """The name under which a parameter is kept: as if the graft were called 'default'."""
    for addition, _ in graft.additions():
        if parameter.startswith(f"{addition}."):
            base = addition[: -len(graft.name)]
            return f"{base}{STORED_NAME}{parameter[len(addition) :]}"
    return parameter


def _peft_form(graft: Graft) -> PeftForm | None:
    """The graft as PEFT would write it; None where PEFT cannot express the whole of it, but for a pooled head.

    Beside one adapter these are modules that are trained as a whole (`modules_to_save`).
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
        return None  # a part alone would load without a word and give other outputs
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
    # PEFT wraps the model once for what sits on modules, and not at all for what stands before the text
    wrapper = "base_model" if "prompt_embeddings" in tensors else "base_model.model"
    tensors |= {f"{wrapper}.{name}": parameter for name, parameter in (head | others).items()}
    return PeftForm(config, tensors)


def _savable(graft: Graft, names: set[str], adapter: dict[str, Tensor]) -> bool:
    """Whether PEFT can keep these base parameters beside an adapter: as copies of whole modules, which it finds by name."""
    if "prompt_embeddings" in adapter or graft.statistics or not names <= set(graft.backbone.base_parameters):
        return False
    wholes = _wholes(graft, names)
    modules = [name for name, _ in base_modules(graft.model)]
    owners: dict[int, int] = {}
    for _, parameter in graft.model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    inside = tuple(f"{name}." for name in wholes)
    return (
        all(wholes)
        and {name for name in graft.backbone.base_parameters if name.startswith(inside)} == names
        and all(owners[id(graft.parameters[name])] == 1 for name in names)  # a copy would part tied weights
        and not any(module.endswith(f".{name}") for module in modules for name in wholes)
        and not any(f"{name.removeprefix('base_model.model.')}.".startswith(inside) for name in adapter)
    )


def _wholes(graft: Graft, names: set[str]) -> list[str]:
    """The outermost modules all of whose base parameters are among these: PEFT saves a head of several maps as one."""
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
    """The wrapper class that PEFT is to use; none for a user's own module, which takes what it takes."""
    if not hasattr(graft.model, "config"):
        return None
    if head:
        return "SEQ_CLS"
    if not getattr(graft.model, "can_generate", bool)():
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if graft.model.config.is_encoder_decoder else "CAUSAL_LM"  # type: ignore[union-attr]


@dataclass
class Stored:
    """A graft folder that was read: what to attach, and the tensors to put there.

    `saved`: names of the base's own parameters that PEFT keeps beside an adapter (`modules_to_save`); `keys`: PEFT's
    key for each tensor that stands as it is in its file.
    """

    folder: Path
    method: str
    tensors: dict[str, Tensor]
    fingerprint: str | None = None
    backbone: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    keys: dict[str, str] = field(default_factory=dict)

    def method_for(self, backbone: Backbone) -> Chain:
        """The method; modules that PEFT saved are the backbone's own head, or are unfrozen."""
        text = self.method
        maps = [site.name for site in backbone.sites if site.role == "head" and is_linear(site.module)]
        output = f"{maps[-1]}.weight" if maps else ""
        if output in self.saved:
            text += f" + head(classes={self.tensors[output].shape[0]}, pooling='own')"
        heads = {site.name for site in backbone.sites if site.role == "head"}
        others = [n.rpartition(".")[0] for n in self.saved if n not in backbone.missing]
        others = [re.escape(owner) for owner in dict.fromkeys(others) if owner not in heads]
        if others:
            text += f" + unfreeze({'re:' + '|'.join(others)!r})"
        return read_method(text) if text else Chain()  # of a task that trains nothing

    def tensors_for(self, graft: Graft) -> dict[str, Tensor]:
        """Tensors by the parameter names that the graft has on its backbone. Raises `UserError` for misfits."""
        names = {stored_name(graft, name): name for name in graft.tensors}
        tensors = graft.method.unpack(graft.backbone, dict(self.tensors))
        return {names.get(stored, stored): tensor for stored, tensor in tensors.items()}


def _description(path: Path) -> dict[str, Any]:
    """The description, its shape checked: what it says is used to open files."""
    description = read_json(path)
    if not isinstance(description, dict) or "format" not in description:
        raise UserError(f"{path} is not the description of a graft; restore it from a copy.")
    if description["format"] != FORMAT:
        raise UserError(
            f"{path} has format {description['format']!r}; this graftkit reads {FORMAT}. Update graftkit."
        )
    kinds = {"method": str, "backbone": str, "fingerprint": str, "tensors": dict, "missing": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(description.get(key), kind)]
    if not wrong and not all(
        isinstance(entry, dict) and isinstance(entry.get("file"), str) and isinstance(entry.get("key"), str)
        for entry in description["tensors"].values()
    ):
        wrong = ["tensors"]
    if wrong:
        raise UserError(
            f"{path}: the entry {listing(map(repr, wrong))} is absent or not as written; restore it from a copy."
        )
    return description


def read(folder: Path) -> Stored:
    """Read a folder written by `write`, or by PEFT. Raises `UserError` for what is missing or broken."""
    if not folder.is_dir():
        raise UserError(f"graft folder {str(folder)!r} does not exist.")
    if not (folder / DESCRIPTION).is_file():
        if (folder / PEFT_CONFIG).is_file():
            from graftkit.grafts.peft_folder import read_peft

            return read_peft(folder)
        raise UserError(f"{folder} has neither {DESCRIPTION} nor {PEFT_CONFIG}, so it is not a graft folder.")
    description = _description(folder / DESCRIPTION)
    files = {entry["file"] for entry in description["tensors"].values()}
    if not files <= {PEFT_TENSORS, OWN_TENSORS}:
        raise UserError(f"{folder / DESCRIPTION} names files that are not part of a graft: {sorted(files)}.")
    contents = {file: read_tensors(folder / file)[0] for file in files}
    tensors = {}
    for name, entry in description["tensors"].items():
        if entry["key"] not in contents[entry["file"]]:
            raise UserError(f"{folder / entry['file']} lacks {entry['key']!r}, which {DESCRIPTION} names.")
        tensors[name] = contents[entry["file"]][entry["key"]]
    strange = set(contents.get(OWN_TENSORS, ())) - {entry["key"] for entry in description["tensors"].values()}
    if strange:
        raise UserError(
            f"{folder / OWN_TENSORS} holds {listing(map(repr, sorted(strange)), 4)}, which {DESCRIPTION} does not name; "
            "the two files are not of one graft."
        )
    return Stored(
        folder,
        description["method"],
        tensors,
        description["fingerprint"],
        description["backbone"],
        description,
    )


def load(model: nn.Module | Backbone, path: str | Path, *, name: str = "default") -> Graft:
    """Attach the graft in folder `path` (written by `Graft.save` or by PEFT) to its backbone.

    Raises `UserError` for another backbone, for missing, unexpected or misshapen tensors.
    """
    stored = read(Path(path))
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    if stored.fingerprint is not None and stored.fingerprint != backbone.fingerprint:
        raise UserError(
            f"the graft in {path} was trained on another backbone ({stored.backbone or 'unknown'}, fingerprint "
            f"{stored.fingerprint}); {backbone.source} has {backbone.fingerprint}. Load that backbone instead."
        )
    before, graft = backbone.missing, None
    backbone.missing = tuple(sorted({*before, *map(str, stored.about.get("missing", ()))}))
    try:
        graft = attach(backbone, stored.method_for(backbone), name=name)
        wanted = graft.tensors
        tensors = stored.tensors_for(graft)
        _refuse_misfits(path, backbone, wanted, tensors)
    except BaseException as error:
        if graft is not None:
            detach(graft)
        backbone.missing = before
        if isinstance(error, UserError) and str(path) not in str(error):
            raise UserError(f"the graft in {path} does not fit {backbone.source}: {error}") from None
        raise
    with torch.no_grad():
        for tensor_name, tensor in wanted.items():
            tensor.copy_(tensors[tensor_name])
    return graft


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
                f"but {tuple(parameter.shape)} is needed."
            )
        kinds = [(t.dtype.is_floating_point, t.dtype.is_complex) for t in (tensors[name], parameter)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"the graft in {path}: {name!r} is stored as {tensors[name].dtype}, but {parameter.dtype} is needed."
            )
        if tensors[name].isnan().any():
            raise UserError(
                f"the graft in {path}: {name!r} holds values that are no numbers (NaN); restore it from a copy."
            )
