"""Losses and gradient norms of tiny runs, compared with those that were recorded.

For each task and method of cases.py, `graftkit.tune` takes ten steps in fp32 on a random model, with dropout as the
model's config has it. The suite runs some of the cases (`tried`). Run all of them before and after a change that only
moves code:

    GRAFTKIT_GOLDEN_ALL=1 pytest tests/golden

Each step's loss and gradient norm has to be that of golden.json; where a run evaluates, so has the loss of the
evaluation, and with `prompting`, which trains nothing, all of its figures. A change that only moves code leaves every bit
as it was.

Another CPU, or another build of torch, adds numbers in another order. With the instruction sets of older CPUs, losses
came out different by less than 1e-5 of their size and gradient norms by less than 3e-5, so the tolerances are 1e-4 and
5e-4. On the machine that recorded them, where all of it is the same, run all cases and compare exactly:

    GRAFTKIT_GOLDEN_EXACT=1 pytest tests/golden

To record anew, where numbers are meant to change: `python tests/golden/record.py` (see there).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, METHODS, TASKS, run
from inputs import MODELS

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
EXACT = os.environ.get("GRAFTKIT_GOLDEN_EXACT") == "1"
ALL = EXACT or os.environ.get("GRAFTKIT_GOLDEN_ALL") == "1"
OTHERS = (  # options of tasks, and models
    "classify_pooled-head",
    "classify_ordinal-lora",
    "generate_packing-lora",
    "generate_t5-lora",
    "audio_waves-full",
    "prompting-masked-shots2",
    "prompting-gpt2-calibrateTrue",
)
TOLERANCES = {"loss": 1e-4, "gradient_norm": 5e-4, "evaluation": 1e-4, "metrics": 1e-4}


def tried(name: str) -> bool:
    """Whether the suite runs a case: each task with every fourth method, all methods that have one task only, and some
    of the options."""
    task, _, method = name.partition("-")
    methods = [*METHODS, "head"]
    if task in TASKS and method in methods:
        return (list(TASKS).index(task) + methods.index(method)) % 4 == 0
    return task in TASKS or name in OTHERS


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory) -> Callable[[str], Path]:
    """`golden_model(kind)`: the model's folder, built when it is first asked for."""
    built: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in built:
            built[kind] = MODELS[kind](tmp_path_factory.mktemp("golden") / kind)
        return built[kind]

    return folder


def test_every_case_is_recorded():
    assert list(GOLDEN["cases"]) == list(CASES)


def test_each_task_model_and_method_is_tried():
    def parts(names):
        found = (name.partition("-") for name in names)
        return {part for task, _, method in found if task in TASKS for part in (task, method)}

    names = set(filter(tried, CASES))
    assert parts(names) == parts(CASES) and set(OTHERS) <= names
    assert {CASES[name].model for name in names} == set(MODELS)


@pytest.mark.sampled
@pytest.mark.parametrize("name", [name for name in CASES if ALL or tried(name)])
def test_a_run_gives_what_was_recorded(name, golden_model, tmp_path):
    got = run(name, golden_model(CASES[name].model), tmp_path / "run")
    wanted = GOLDEN["cases"][name]
    assert got.keys() == wanted.keys()
    wrong = [difference for key in wanted for difference in differences(key, got[key], wanted[key])]
    assert not wrong, (
        f"{name} {'(exactly) ' if EXACT else ''}recorded with {GOLDEN['made with']}:\n" + "\n".join(wrong)
    )


def differences(key: str, got: Any, wanted: Any) -> list[str]:
    """What is wrong with a number, with a list by step, or with figures by name."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        places = [(f"{key} {name}", got[name], value) for name, value in wanted.items()]
    elif isinstance(wanted, list):
        assert len(got) == len(wanted)
        places = [(f"{key} of step {i}", *values) for i, values in enumerate(zip(got, wanted), 1)]
    else:
        places = [(key, got, wanted)]
    return [
        f"  {place}: {value!r}, recorded {recorded!r}"
        for place, value, recorded in places
        if value != (recorded if EXACT else pytest.approx(recorded, rel=TOLERANCES[key], abs=1e-9))
    ]
