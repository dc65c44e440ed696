"""docs/new-optimizer.md, followed to the letter: its file in a folder of one's own is an optimizer like any other."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import forked, tune_words

import graftkit
from graftkit.recipe import schema as recipes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "new-optimizer.md"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder that holds the page's file and is named by the environment."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None and code[1].count("\n") < 80
    own = tmp_path / "own"
    own.mkdir()
    (own / "signum.py").write_text(code[1], encoding="utf-8")
    monkeypatch.setenv("GRAFTKIT_OPTIMIZERS", str(own))
    return own


def test_the_command_line_knows_it(folder, command):
    assert "sign(m) + decay W" in command("optimizers").out
    shown = command("optimizers", "signum").out
    assert "Memory: 1 number" in shown and "beta = 0.9  decay of the moment" in shown
    assert "signum(beta=0.9)" in json.dumps(recipes.schema())


def test_plan_and_run(folder, tiny_bert, rows_folder, tmp_path, command):
    method = "full() + layerwise_lr() + head()"
    words = tune_words(tiny_bert, rows_folder, tmp_path / "run", "train.steps=3", "train.optimizer=signum()",
                       "--json", method=method)  # fmt: skip
    planned = json.loads(command("plan", *words[1:]).out)
    assert planned["optimizer"] == "signum()"
    assert planned["optimizer_bytes"] == 4 * planned["trained_parameters"]
    done = command(*words)
    assert done.status == 0, done.err
    assert json.loads(done.out)["optimizer"] == "signum()"
    assert "with signum()" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_steps_are_those_of_the_paper(folder):
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = (torch.randn(5, 3, generator=generator) for _ in range(7))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = graftkit.Signum(beta=0.8).make([{"params": [parameter], "lr": 0.1, "weight_decay": 0.3}])
    moment = torch.zeros(5, 3)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        moment = 0.8 * moment + 0.2 * gradient
        weight = weight - 0.1 * (torch.sign(moment) + 0.3 * weight)
    torch.testing.assert_close(parameter.detach(), weight)


@pytest.mark.slow
def test_it_passes_the_contract_suite(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-k",
        "signum",
        "tests/optim/test_optimizer_contract.py",
    ]
    monkeypatch.delitem(
        sys.modules, "test_optimizer_contract", raising=False
    )  # collected before the file was there
    done = forked(lambda: sys.exit(pytest.main([*words, "--rootdir", str(ROOT)])))
    assert done.status == 0, done.out[-3000:]
    assert "." * 5 in done.out, done.out[-500:]


@pytest.mark.parametrize(
    "setting,told",
    [
        ("signum(betta=0.5)", "signum() has no option 'betta' (options: beta). Did you mean 'beta'?"),
        ("signum(beta=1)", "signum(): beta is 1, but must be below 1"),
        ("signom()", "muon, signum). Did you mean 'signum'?"),
        ("lora(rank=8)", "lora() is a method, not an optimizer: write method=lora(rank=8)"),
        ("signum() + adamw()", "a run has one optimizer"),
        ("3", "train.optimizer is 3, but must be a valid string"),
    ],
)
def test_what_a_recipe_cannot_say(folder, setting, told, command):
    done = command("tune", "--model", "m", "--train", "t.csv", f"train.optimizer={setting}")
    assert done.status == 1 and told in done.err


def test_methods_that_are_optimizers_are_refused_with_what_to_write(folder, command):
    done = command("tune", "--model", "m", "--train", "t.csv", "--method", "signum(beta=0.5) + head()")
    assert "write train.optimizer=signum(beta=0.5) instead, beside method=full()" in done.err


def test_a_folder_that_is_none(monkeypatch, command):
    monkeypatch.setenv("GRAFTKIT_OPTIMIZERS", "/nowhere/at/all")
    done = command("optimizers")
    assert (
        done.status == 1 and "GRAFTKIT_OPTIMIZERS names '/nowhere/at/all', which is not a folder" in done.err
    )
