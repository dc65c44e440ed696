"""The graft folder.

adapter_config.json, adapter_model.safetensors   a PEFT adapter, if PEFT can express a part of the graft
graft.safetensors                                 every tensor of the graft that is not in the PEFT file
graft.json                                        the method, the backbone's fingerprint, and for each
                                                  of its tensors the file and key
confidence.safetensors                            what a run has fitted on its evaluation rows; no part of the graft,
                                                  and removed when another one is written to the folder
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from graftkit.errors import UserError, listing
from graftkit.files import CHECKSUM, assembling, read_json, read_tensors, write_json, write_tensors
from graftkit.grafts.peft_folder import read_peft
from graftkit.grafts.stored import (
    CONFIDENCE,
    DESCRIPTION,
    OWN_TENSORS,
    PEFT_CONFIG,
    PEFT_TENSORS,
    SUMS,
    Contents,
    Stored,
)
from graftkit.recipe.expressions import renewed

FORMAT = 1
FILES = (PEFT_CONFIG, PEFT_TENSORS, OWN_TENSORS, DESCRIPTION, CONFIDENCE)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_place(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("file")) and _is_text(value.get("key"))


def _is_mapping(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


FIELDS: dict[str, Callable[[Any], bool]] = {  # of the description, and what holds for their values
    "method": _is_text,
    "backbone": _is_text,
    "fingerprint": _is_text,
    "tensors": _is_mapping(_is_place),
    "missing": _are_texts,
}
FIELDS_OF_RUNS: dict[str, Callable[[Any], bool]] = {
    "labels": _are_texts,
    "task": _is_text,
    "precision": lambda value: value in ("fp32", "bf16", "fp16"),
    "columns": _is_mapping(_is_text),
    "max_length": lambda value: _is_number(value) and isinstance(value, int) and 0 <= value < 2**31,
    "base_values": _is_mapping(lambda values: isinstance(values, list) and all(map(_is_number, values))),
}


def write(folder: Path, contents: Contents) -> Path:
    """Write the folder beside its place and move it in: what a killed process leaves there opens as no graft."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder for the graft.")
    tensors, form, description = contents.tensors, contents.form, contents.description
    where: dict[str, dict[str, str]] = {}
    own: dict[str, Tensor] = {}
    keys = {id(tensor): key for key, tensor in form.tensors.items()} if form else {}
    for name, tensor in tensors.items():
        if id(tensor) in keys:
            where[name] = {"file": PEFT_TENSORS, "key": keys[id(tensor)]}
        else:
            where[name] = {"file": OWN_TENSORS, "key": name}
            own[name] = tensor
    with assembling(folder, old=FILES, last=(PEFT_CONFIG, DESCRIPTION)) as part:
        sums = {}
        if form is not None:
            sums[PEFT_TENSORS] = write_tensors(part / PEFT_TENSORS, form.tensors)
            write_json(part / PEFT_CONFIG, form.config)
        if own:
            sums[OWN_TENSORS] = write_tensors(part / OWN_TENSORS, own)
        if description is not None:
            about = {"format": FORMAT, **description, "tensors": where, SUMS: sums}
            write_json(part / DESCRIPTION, about)
    return folder


def _contents(folder: Path, file: str, sums: Any) -> dict[str, Tensor]:
    """Read one of a graft's files. Raises `UserError` if the description was written with another one."""
    tensors, metadata = read_tensors(folder / file)
    described = sums.get(file) if isinstance(sums, dict) else None
    if described is not None and metadata.get(CHECKSUM, described) != described:
        raise UserError(
            f"{folder / file} is not the file that {DESCRIPTION} beside it was written with (its checksum differs); "
            "restore both from one copy."
        )
    return tensors


def _description(path: Path) -> dict[str, Any]:
    """Read the description and check its structure: it names files to open."""
    description = read_json(path)
    if "format" not in description:
        raise UserError(f"{path} is not the description of a graft; restore it from a backup.")
    if description["format"] != FORMAT:
        raise UserError(
            f"{path} has format {description['format']!r}, but this graftkit reads {FORMAT}. Update graftkit."
        )
    wrong = [key for key, holds in FIELDS.items() if not holds(description.get(key))]
    wrong += [
        key for key, holds in FIELDS_OF_RUNS.items() if key in description and not holds(description[key])
    ]
    if wrong:
        raise UserError(
            f"{path}: the entry {listing(map(repr, wrong))} is missing or invalid; restore it from a backup."
        )
    return description


def read(folder: Path) -> Stored:
    """Read a folder written by `write`, or by PEFT. Raises `UserError` for missing or broken files."""
    if not folder.is_dir():
        raise UserError(f"graft folder {str(folder)!r} does not exist.")
    if not (folder / DESCRIPTION).exists():
        if (folder / PEFT_CONFIG).exists():
            return read_peft(folder)
        raise UserError(f"{folder} has neither {DESCRIPTION} nor {PEFT_CONFIG}, so it is not a graft folder.")
    description = _description(folder / DESCRIPTION)
    files = {entry["file"] for entry in description["tensors"].values()}
    if not files <= {PEFT_TENSORS, OWN_TENSORS}:
        raise UserError(f"{folder / DESCRIPTION} names files that are not part of a graft: {sorted(files)}.")
    contents = {file: _contents(folder, file, description.get(SUMS)) for file in files}
    tensors = {}
    for name, entry in description["tensors"].items():
        if entry["key"] not in contents[entry["file"]]:
            raise UserError(f"{folder / entry['file']} lacks {entry['key']!r}, which {DESCRIPTION} names.")
        tensors[name] = contents[entry["file"]][entry["key"]]
    strange = set(contents.get(OWN_TENSORS, ())) - {entry["key"] for entry in description["tensors"].values()}
    if strange:
        raise UserError(
            f"{folder / OWN_TENSORS} contains {listing(map(repr, sorted(strange)), 4)}, which {DESCRIPTION} does not name; "
            "the two files belong to different grafts."
        )
    unnamed = set(contents.get(PEFT_TENSORS, ())) - {
        entry["key"] for entry in description["tensors"].values()
    }
    if (
        unnamed and (folder / PEFT_CONFIG).exists()
    ):  # PEFT needs some that the graft does not, and has no others
        beside = read_peft(folder)
        strange = {beside.keys[name] for name in beside.saved if name in beside.keys} & unnamed
        if strange:
            raise UserError(
                f"{folder / PEFT_TENSORS} contains {listing(map(repr, sorted(strange)), 4)}, which {DESCRIPTION} does not "
                "name; the two files belong to different grafts."
            )
    return Stored(
        folder,
        renewed(description["method"], "method"),
        tensors,
        description["fingerprint"],
        description["backbone"],
        description,
    )
