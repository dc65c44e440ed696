"""PEFT's VeRA, LoHa, LoKr and AdaLoRA that are refused: wrong numbers, missing tensors, patterns that do not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_peft_low_rank import CONFIGS, FIRST, STEPS, made, with_peft

from graftkit import UserError, load

pytestmark = pytest.mark.sampled


def written(tmp_path: Path, method: str, name: str = "maps", **more: Any) -> Path:
    settings = {**FIRST, **(STEPS if method == "adalora" else {}), **more}
    with_peft(made(name), method, settings).save_pretrained(str(tmp_path))
    return tmp_path


def refusal(folder: Path, name: str = "maps", **changes: Any) -> str:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = made(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as caught:
        load(model, folder)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    return str(caught.value)


@pytest.mark.parametrize("method", CONFIGS)
def test_ranks_that_are_not_those_of_the_tensors(method, tmp_path):
    name = "init_r" if method == "adalora" else "r"
    assert "has shape" in refusal(written(tmp_path, method, **{name: 1}), **{name: 2})


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("rank", [0, "8", None])
def test_ranks_that_are_none(method, rank, tmp_path):
    name = "init_r" if method == "adalora" else "r"
    assert name in refusal(written(tmp_path, method), **{name: rank})


@pytest.mark.parametrize("method", CONFIGS)
def test_fields_that_are_not_read(method, tmp_path):
    assert "new_trick=1" in refusal(written(tmp_path, method), new_trick=1)


@pytest.mark.parametrize("method", ["vera", "adalora"])
def test_biases_are_not_read(method, tmp_path):
    assert "bias='all'" in refusal(written(tmp_path, method), bias="all")


@pytest.mark.parametrize("method", CONFIGS)
def test_tensors_that_are_missing_or_too_many(method, tmp_path):
    folder = written(tmp_path, method)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(key for key in tensors if key.startswith("base_model.model."))
    save_file({key: t for key, t in tensors.items() if key != first}, path)
    assert "missing" in refusal(folder)
    save_file(tensors | {first + "x": torch.ones(2)}, path)
    assert "x" in refusal(folder)


def test_projections_that_are_missing(tmp_path):
    folder = written(tmp_path, "vera")
    path = folder / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if not k.endswith("vera_B")}, path)
    assert "save_projection is true" in refusal(folder)


def test_a_whole_kernel_in_one_dimension(tmp_path):
    """PEFT's product is no Kronecker product there."""
    assert "one-dimensional" in refusal(written(tmp_path, "lokr", "sounds", r=9), "sounds")


@pytest.mark.parametrize("pattern", [[True], "first", [True, False, True, True, True]])
def test_a_pattern_that_does_not_fit(pattern, tmp_path):
    folder = written(tmp_path, "adalora", init_r=4)
    told = refusal(folder, rank_pattern={"first.lora_E": pattern})
    assert "rank_pattern" in told and "first" in told


@pytest.mark.parametrize(
    "method,pattern",
    [("adalora", [1]), ("loha", [1]), ("lokr", "first"), ("loha", {"(": 2}), ("loha", {"first": "8"})],
)
def test_a_pattern_that_is_none(method, pattern, tmp_path):
    assert "rank" in refusal(written(tmp_path, method), rank_pattern=pattern)


def test_a_pattern_that_keeps_another_number(tmp_path):
    folder = written(tmp_path, "adalora", init_r=4)
    told = refusal(folder, rank_pattern={"first.lora_E": [True, False, True, True]})
    assert "keeps 3" in told
