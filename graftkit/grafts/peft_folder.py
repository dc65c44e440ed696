"""Adapters that PEFT wrote, read into the methods of this package.

Which method reads a kind of adapter is the method's own affair: `Method.peft_types` names the kinds and
`Method.from_peft` turns a configuration and its tensors into the method's options and parameters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from graftkit.errors import UserError, listing
from graftkit.files import read_json, read_tensors
from graftkit.grafts.folder import PEFT_CONFIG, PEFT_TENSORS, Stored
from graftkit.recipe.catalogue import Call, entries

# fields that say where an adapter comes from or how it was trained, not what it computes
HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying", "qalora_group_size",
}  # fmt: skip

ANY = "*"  # in `Method.peft_types`: each kind that no other method reads


class PeftReading:
    """A PEFT folder while a method reads it: what it does not ask for and does not take is an error.

    `tensors`: those that no one has taken yet, by key without `base_model.model.`.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.folder = folder
        self.kind = str(config.get("peft_type"))
        self.tensors = tensors
        self._config = config
        self._read = set(HARMLESS)

    def field(self, name: str, default: Any = None, kind: type | tuple[type, ...] | None = None) -> Any:
        """A field of the configuration; `default` is PEFT's, for configurations that leave it out.

        Raises `UserError` where the value is not of `kind`.
        """
        self._read.add(name)
        value = self._config.get(name, default)
        if value is None and kind is None:
            value = default
        if kind is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise self.error(f"{name} is {self._config.get(name)!r}, which cannot be.")
        return value

    def rest(self) -> dict[str, Any]:
        """The fields that nobody asked for yet; they count as asked for."""
        rest = {name: value for name, value in self._config.items() if name not in self._read}
        self._read.update(rest)
        return rest

    def ignore(self, *names: str) -> None:
        """Fields that had a part in training only."""
        self._read.update(names)

    def take(self, pattern: str) -> dict[re.Match[str], Tensor]:
        """Take the tensors whose whole key matches a regular expression, in the file's order."""
        found = {}
        for key in list(self.tensors):
            match = re.fullmatch(pattern, key)
            if match is not None:
                found[match] = self.tensors.pop(key)
        return found

    def error(self, what: str) -> UserError:
        return UserError(f"{self.folder / PEFT_CONFIG}: {what}")

    def refuse_rest(self) -> None:
        """Raise `UserError` for fields that change the result and that nobody asked for."""
        unread = [
            f"{name}={value!r}"
            for name, value in self._config.items()
            if name not in self._read and value not in (None, False, "none", "", 0) and value not in ({}, [])
        ]
        if unread:
            raise self.error(f"uses {listing(unread)}, which graftkit does not read.")


def read_peft(folder: Path) -> Stored:
    """An adapter of PEFT as one of our methods; its saved modules are the head, or unfrozen."""
    config = read_json(folder / PEFT_CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{folder / PEFT_CONFIG} is not the configuration of an adapter.")
    kind = config.get("peft_type")
    readers = {
        name: entry
        for entry in entries("method").values()
        for name in entry.load().peft_types  # type: ignore[attr-defined]
    }
    if not isinstance(kind, str):
        raise UserError(
            f"{folder / PEFT_CONFIG}: peft_type is {kind!r}; it must be the name of a kind of adapter."
        )
    reader = readers.get(kind) or readers[ANY]
    contents, _ = read_tensors(folder / PEFT_TENSORS)
    wrapped = {
        key.removeprefix("base_model.model.").removeprefix("base_model."): t for key, t in contents.items()
    }
    reading = PeftReading(folder, config, wrapped)
    arguments, tensors = reader.load().from_peft(reading)  # type: ignore[attr-defined]
    reading.refuse_rest()
    strange = [key for key in reading.tensors if key in contents or _is_adapter_key(key)]
    if strange:
        raise UserError(
            f"{folder / PEFT_TENSORS}: {listing(map(repr, strange), 4)} is not a tensor of {kind} that graftkit reads."
        )
    name = arguments.pop("method", reader.name)  # a kind of adapter that several methods write
    saved = tuple(reading.tensors)
    found = {**tensors, **reading.tensors}
    in_file = {id(tensor): key for key, tensor in contents.items()}
    keys = {own: in_file[id(tensor)] for own, tensor in found.items() if id(tensor) in in_file}
    return Stored(
        folder,
        str(Call(name, arguments)),
        found,
        backbone=config.get("base_model_name_or_path"),
        saved=saved,
        keys=keys,
    )


def _is_adapter_key(key: str) -> bool:
    """Whether a key is of an adapter, and not that of a parameter of the model."""
    return (
        re.search(r"\.(lora|ia3|vera|hada|lokr|oft|boft|hra)_|\.base_layer\.|prompt_", f".{key}") is not None
    )
