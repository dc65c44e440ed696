"""Read PEFT adapters into the methods of this package.

Each method declares the adapters that it reads: `Method.peft_types` names their types, and
`Method.from_peft` turns a configuration and its tensors into the method's options and parameters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from graftkit.errors import UserError, listing
from graftkit.files import read_json, read_tensors
from graftkit.grafts.stored import Stored
from graftkit.methods.shared.peft_reading import ANY, PEFT_CONFIG, PEFT_TENSORS, PeftReading
from graftkit.recipe.catalogue import entries
from graftkit.recipe.expressions import Call


def read_peft(folder: Path) -> Stored:
    """Read a PEFT adapter as one of our methods; its saved modules become the head, or are unfrozen."""
    config = read_json(folder / PEFT_CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise UserError(f"{folder / PEFT_CONFIG}: peft_type is {kind!r}; it must be the name of a PEFT type.")
    kinds: dict[Any, str] = {entry.load(): entry.name for entry in entries("method").values()}
    readers = [cls for cls in kinds if cls.reads_peft(config)]
    reader = (readers or [cls for cls in kinds if ANY in cls.peft_types])[0]
    contents, _ = read_tensors(folder / PEFT_TENSORS)
    wrapped = {
        key.removeprefix("base_model.model.").removeprefix("base_model."): t for key, t in contents.items()
    }
    reading = PeftReading(folder, config, wrapped)
    reading.names("modules_to_save")
    base = reading.field("base_model_name_or_path", None, (str, type(None)))
    arguments, tensors = reader.from_peft(reading)
    reading.refuse_rest()
    strange = [key for key in reading.tensors if key in contents or _is_adapter_key(key)]
    if strange:
        raise UserError(
            f"{folder / PEFT_TENSORS}: {listing(map(repr, strange), 4)} is not a tensor of {kind} that graftkit reads."
        )
    saved = tuple(reading.tensors)
    found = {**tensors, **reading.tensors}
    in_file = {id(tensor): key for key, tensor in contents.items()}
    keys = {own: in_file[id(tensor)] for own, tensor in found.items() if id(tensor) in in_file}
    return Stored(
        folder,
        str(Call(kinds[reader], arguments)),
        found,
        backbone=base,
        saved=saved,
        keys=keys,
    )


def _is_adapter_key(key: str) -> bool:
    """Return whether a key belongs to an adapter, not to a parameter of the model."""
    return (
        re.search(r"\.(lora|ia3|vera|hada|lokr|oft|boft|hra)_|\.base_layer\.|prompt_", f".{key}") is not None
    )
