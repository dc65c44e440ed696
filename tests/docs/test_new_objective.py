"""docs/new-objective.md, followed to the letter: its file in a folder of one's own is an objective."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal_bits, graft_tensors, make_rows, write_csv

import graftkit

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "new-objective.md"


@pytest.fixture
def objective(tmp_path, monkeypatch) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None and code[1].count("\n") < 130
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "gaps.py").write_text(code[1], encoding="utf-8")
    monkeypatch.setenv("GRAFTKIT_TASKS", str(tmp_path / "own"))


@pytest.fixture
def bert(tiny_bert, tmp_path) -> Path:
    """The tiny BERT with its head for tokens."""
    from transformers import AutoModelForMaskedLM

    folder = Path(shutil.copytree(tiny_bert, tmp_path / "bert"))
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    return folder


def steps(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def tuned(bert: Path, tmp_path: Path, name: str, **settings) -> Path:
    texts = write_csv(tmp_path / "texts.csv", [{"text": row["text"]} for row in make_rows(48, 1)])
    given = {"train.precision": "fp32", "train.batch_size": 8, **settings}
    made = graftkit.tune(
        model=str(bert), task="gaps(share=0.3)", train=texts, eval=None, method="full(lr=0.003)",
        out=tmp_path / name, settings=given,
    )  # fmt: skip
    return made.path


def test_it_learns_and_its_loss_is_that_of_the_hidden_tokens(objective, bert, tmp_path):
    found = steps(tuned(bert, tmp_path, "run", **{"train.epochs": 8}))
    losses = [step["loss"] for step in found]
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6]) and 0 <= found[-1]["accuracy"] <= 1


def test_other_tokens_are_hidden_in_each_epoch_and_the_same_in_each_run(objective, bert, tmp_path):
    still = {"train.epochs": 2, "train.lr": 1e-12, "train.weight_decay": 0.0}
    first, again = (tuned(bert, tmp_path, name, **still) for name in ("first", "again"))
    assert equal_bits(graft_tensors(first), graft_tensors(again))
    once = [step["loss"] for step in steps(first)]
    assert once == [step["loss"] for step in steps(again)]
    half = len(once) // 2
    assert sorted(once[:half]) != pytest.approx(sorted(once[half:]), rel=1e-3)
