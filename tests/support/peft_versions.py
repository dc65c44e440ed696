"""What tests need of the installed PEFT, where its versions differ."""

from __future__ import annotations

import re

import pytest

from graftkit.libraries import TUNERS_SINCE, installed


def peft_has(version: str) -> bool:
    """Whether the installed PEFT is of this version ('0.20') or newer."""
    places = [tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (installed("peft") or "0", version)]
    return places[0] >= places[1]


def has_tuner(text: str) -> bool:
    """Whether PEFT can build an expression: `peft()` is HiRA by default, which older versions do not have."""
    return not re.search(r"\bpeft\((?!')", text) or peft_has(TUNERS_SINCE["HIRA"])


def skip_without_tuner(text: str) -> None:
    """Skip a test of an expression that the installed PEFT cannot build."""
    if not has_tuner(text):
        pytest.skip(f"HiRA came with PEFT {TUNERS_SINCE['HIRA']}")
