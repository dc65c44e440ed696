"""The contents of a graft folder as values, after reading and before writing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from graftkit.methods.base import PeftForm
from graftkit.methods.shared.peft_reading import PEFT_CONFIG, PEFT_TENSORS  # noqa: F401  (two of its files)

STORED_NAME = "default"  # the name of a graft in its folder, whatever its name on a model
OWN_TENSORS, DESCRIPTION = "graft.safetensors", "graft.json"
CONFIDENCE = "confidence.safetensors"  # fitted on evaluation rows: graftkit/insight/confidence_file.py
SUMS = "checksums"  # in the description: those of the graft's tensor files


@dataclass(frozen=True)
class Contents:
    """The contents to write: every tensor by its stored name, the PEFT form if there is one, and the description.

    Without a description, the folder contains only a PEFT adapter.
    """

    tensors: dict[str, Tensor]
    form: PeftForm | None
    description: dict[str, Any] | None


@dataclass
class Stored:
    """The contents that were read: the method to attach, and its tensors.

    `saved`: names of the base's own parameters that PEFT saved beside an adapter (`modules_to_save`); `keys`: PEFT's
    key for each tensor that is stored unchanged in its file.
    """

    folder: Path
    method: str
    tensors: dict[str, Tensor]
    fingerprint: str | None = None
    backbone: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    keys: dict[str, str] = field(default_factory=dict)
