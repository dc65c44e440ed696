"""The contents of a graft folder as values: what was read, and what is to be written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from graftkit.methods.base import PeftForm
from graftkit.methods.shared.peft_reading import PEFT_CONFIG, PEFT_TENSORS  # noqa: F401  (two of its files)

STORED_NAME = "default"  # what a graft is called in its folder, whatever its name on a model
OWN_TENSORS, DESCRIPTION = "graft.safetensors", "graft.json"


@dataclass(frozen=True)
class Contents:
    """What a graft folder will hold: every tensor by its stored name, those that PEFT has a form for, the description.

    Without a description, the folder is PEFT's alone.
    """

    tensors: dict[str, Tensor]
    form: PeftForm | None
    description: dict[str, Any] | None


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
