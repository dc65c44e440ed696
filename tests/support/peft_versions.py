"""What tests need of the installed PEFT, where its versions differ."""

from __future__ import annotations

import re

import pytest

from graftkit.libraries import TUNERS_SINCE, installed


def peft_has(version: str) -> bool:
    """Whether the installed PEFT is of this version ('0.20') or newer."""
    places = [tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (installed("peft") or "0", version)]
    return places[0] >= places[1]


def skip_without_tuner(text: str) -> None:
    """Skip a test of an expression in which `peft()` takes its default, HiRA, where PEFT has none."""
    if re.search(r"\bpeft\((?!')", text) and not peft_has(TUNERS_SINCE["HIRA"]):
        pytest.skip(f"HiRA came with PEFT {TUNERS_SINCE['HIRA']}")
