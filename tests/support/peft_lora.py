"""What the tests beside PEFT share: a folder read by PEFT, and a LoRA that it wrote."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from custom_models import shake
from torch import nn

from graftkit import attach
from graftkit.grafts.graft import Graft

peft = pytest.importorskip("peft")
ALL_KINDS = pytest.mark.parametrize("kind", tiny.KINDS)


def shaken(model: nn.Module, text: str) -> Graft:
    graft = attach(model, text)
    shake(model)
    return graft


def with_peft(
    model: nn.Module,
    folder: Path,
    trained: Sequence[str] = ("lora_", "modules_to_save"),
    by_hand: Sequence[str] = (),
) -> nn.Module:
    """PEFT's reading of a folder; a warning about keys is an error, and so is a key too many, or one too few whose name
    has one of `trained` in it. `by_hand`: keys that PEFT puts in place without saying so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
        wrapped = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    saved = wrapped.load_adapter(str(folder), adapter_name="default")
    assert set(saved.unexpected_keys) <= set(by_hand)
    assert not [key for key in saved.missing_keys if any(part in key for part in trained)]
    return wrapped


def write_with_peft(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """An adapter that PEFT made on `model`, all of its trained values random, and written."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    shake(wrapped)
    wrapped.save_pretrained(str(folder))
    return wrapped
