"""Read a PEFT folder, and refuse fields and tensors that nobody reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from graftkit.errors import UserError, listing

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"

ANY = "*"  # in `Method.peft_types`: every type that no other method reads

# fields about an adapter's origin or training, which do not change its outputs
HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying", "qalora_group_size",
}  # fmt: skip


class PeftReading:
    """A PEFT folder while a method reads it: fields that are not requested and tensors that are not taken are errors.

    `tensors`: those not taken yet, by key without `base_model.model.`.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.folder = folder
        self.kind = str(config.get("peft_type"))
        self.tensors = tensors
        self._config = config
        self._read = set(HARMLESS)

    def field(self, name: str, default: Any = None, kind: type | tuple[type, ...] | None = None) -> Any:
        """Return a field of the configuration; `default` is PEFT's, for configurations without the field.

        Raises `UserError` if the value is not of type `kind`.
        """
        self._read.add(name)
        value = self._config.get(name, default)
        if value is None and kind is None:
            value = default
        if kind is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise self.error(f"{name} is {self._config.get(name)!r}, which is not a valid value.")
        return value

    def rest(self) -> dict[str, Any]:
        """Return the fields that were not requested yet, and mark them as read."""
        rest = {name: value for name, value in self._config.items() if name not in self._read}
        self._read.update(rest)
        return rest

    def ignore(self, *names: str) -> None:
        """Mark fields as read that matter only for training."""
        self._read.update(names)

    def take(self, pattern: str) -> dict[re.Match[str], Tensor]:
        """Remove and return the tensors whose full key matches a regular expression, in the file's order."""
        found = {}
        for key in list(self.tensors):
            match = re.fullmatch(pattern, key)
            if match is not None:
                found[match] = self.tensors.pop(key)
        return found

    def names(self, field: str) -> list[str]:
        """Return a field that is a list of names; an empty one if it is absent or null."""
        found = self.field(field, [], (list, type(None))) or []
        if not all(isinstance(name, str) for name in found):
            raise self.error(f"{field} is {found!r}, but must be a list of names.")
        return found

    def where(self, what: str) -> str:
        return f"{self.folder / PEFT_CONFIG}: {what}"

    def error(self, what: str) -> UserError:
        return UserError(self.where(what))

    def refuse_rest(self) -> None:
        """Raise `UserError` for unread fields that may change the result."""
        unread = [
            f"{name}={value!r}"
            for name, value in self._config.items()
            if name not in self._read and value not in (None, False, "none", "", 0) and value not in ({}, [])
        ]
        if unread:
            raise self.error(f"uses {listing(unread)}, which graftkit does not read.")
