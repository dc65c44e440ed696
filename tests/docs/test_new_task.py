"""docs/new-task.md, followed to the letter: its file in a folder of one's own is a task like any other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import forked

import graftkit
from graftkit.cli.main import main
from graftkit.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "new-task.md"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder that holds the page's file and is named by the environment."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None and code[1].count("\n") < 120
    own = tmp_path / "own"
    own.mkdir()
    (own / "similar.py").write_text(code[1], encoding="utf-8")
    monkeypatch.setenv("GRAFTKIT_TASKS", str(own))
    return own


@pytest.fixture
def pairs(tmp_path) -> Path:
    words = ["plum", "saw", "fruit", "old", "card", "my", "the"]
    random = np.random.default_rng(0)
    lines = ["text,text_pair,score"]
    for _ in range(48):
        first, second = (" ".join(random.choice(words, 4)) for _ in range(2))
        shared = len(set(first.split()) & set(second.split())) / 4
        lines.append(f"{first},{second},{shared}")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*words: str) -> SimpleNamespace:
    return forked(lambda: main(list(words)))


def test_the_command_line_knows_it(folder):
    assert "similar" in run("tasks").out and "fitted by squared error" in run("tasks", "similar").out
    assert "Did you mean 'similar'" in run("tasks", "similer").err


@pytest.mark.slow
def test_it_trains_answers_and_evaluates(folder, pairs, tiny_bert, tmp_path):
    words = ["--model", str(tiny_bert), "--task", "similar", "--train", str(pairs), "train.epochs=6"]
    words += [
        "--method",
        "lora(lr=0.02)",
        "--out",
        str(tmp_path / "run"),
        "train.precision=fp32",
        "train.batch_size=8",
    ]
    done = run("tune", *words, "--json")
    assert done.status == 0, done.err
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if line["kind"] == "step"]
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) and "accuracy" not in steps[0]
    found = json.loads(run("evaluate", str(tmp_path / "run"), "--data", str(pairs), "--json").out)
    assert found["metrics"]["rows"] == 48 and np.isfinite(found["metrics"]["loss"])
    lines = run("predict", str(tmp_path / "run"), "--data", str(pairs)).out.splitlines()
    assert len(lines) == 48 and all(re.match(r"-?\d\.\d{3}\t", line) for line in lines)


@pytest.mark.slow
def test_its_cosines_are_those_of_the_model(folder, pairs, tiny_bert, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    made = graftkit.tune(
        model=str(tiny_bert), task="similar", train=pairs, method="lora(lr=0.02)", out=tmp_path / "run",
        settings={"train.steps": 8, "train.precision": "fp32"},
    )  # fmt: skip
    model = AutoModel.from_pretrained(tiny_bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)

    def cosine() -> float:
        texts = ("the plum", "my old saw")
        return torch.cosine_similarity(
            *(model(**tokenizer(t, return_tensors="pt"))[0].mean(dim=1) for t in texts)
        ).item()

    base = cosine()
    graftkit.load(model, made.path / "graft")
    wanted = cosine()
    assert abs(base - wanted) > 1e-4
    answer = made.predict([("the plum", "my old saw")])[0]
    assert answer["similarity"] == pytest.approx(wanted, abs=1e-4)


def test_bad_scores_are_named(folder, tiny_bert, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("text,text_pair,score\na,b,0.5\nc,d,seven\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"bad.csv, line 3: column 'score' is not a number from 0 to 1"):
        graftkit.tune(model=str(tiny_bert), task="similar", train=path, out=tmp_path / "run")


def test_a_head_is_refused(folder, pairs, tiny_bert, tmp_path):
    with pytest.raises(UserError, match="leave head"):
        graftkit.tune(
            model=str(tiny_bert), task="similar", train=pairs, method="lora() + head()", out=tmp_path / "run"
        )
