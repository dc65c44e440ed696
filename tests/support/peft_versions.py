"""What tests need of the installed PEFT, where its versions differ."""

from __future__ import annotations

import functools
import re

import pytest

from graftkit.libraries import TUNERS_SINCE, installed

# Where PEFT 0.18 does otherwise than 0.21, whose rules and files are GraftKit's: what a test's name contains, and the difference.
BEFORE_0_19 = {
    r"test_peft_merge.*svd": "the rules with svd apply the scale of each adapter twice",
    r"test_random_masks_are_drawn_as_peft": "random masks of a merge are drawn otherwise",
    r"test_we_read_pefts_forms.*some biases": "biases of bias='lora_only' are not saved",
    r"_on_modules_of_ones_own.*lora_only": "biases of bias='lora_only' are not saved",
    r"test_packed_attention.*settings[12]": "biases of packed attention are saved under another name, or not at all",
    r"that_do_not_matter\[mica\]": "there is no init_lora_weights='mica'",
    r"experts.*-mixture": "factors of experts have other shapes",
    r"test_peft_low_rank.*(grouped|sounds)-lo(ha|kr)": "LoHa and LoKr do not divide convolutions by their groups",
    r"test_small_modules.*lo(ha|kr)-Conv\w*(Groups|Depthwise)": "LoHa and LoKr do not divide convolutions by their groups",
    r"test_peft_low_rank.*images-adalora": "AdaLoRA does not adapt convolutions",
    r"test_small_modules\[False-adalora-Conv2d": "AdaLoRA does not adapt convolutions",
    r"test_peft_low_rank.*(maps|transposed)-vera": "VeRA's shared factors have other names and values",
    r"test_language_models_with_a_head.*vera": "VeRA's shared factors have other names and values",
    r"test_convolutions_of_peft_to_ours\[inner[12]\]": "IA3 does not scale these convolutions",
}


def difference(test: str) -> str | None:
    """What the installed PEFT does otherwise in a test; None if it is to pass."""
    if peft_has("0.19"):
        return None
    found = (what for pattern, what in BEFORE_0_19.items() if re.search(pattern, test))
    return next((f"PEFT {installed('peft')}: {what}" for what in found), None)


@functools.cache
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
