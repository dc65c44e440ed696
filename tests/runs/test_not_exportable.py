"""What cannot be exported afterwards is said by the plan and by the start of a run, with the reason."""

from __future__ import annotations

import json

import pytest
from conftest import make_rows
from language_models import folder

TIED, PLAIN = "lora(sites='embeddings')", "lora()"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GPT-2 whose output layer is its table of embeddings."""
    return folder(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


@pytest.mark.parametrize("method", [TIED, PLAIN])
@pytest.mark.slow
def test_plan_and_tune_say_it_before_the_first_step(command, model, tmp_path, method):
    path = tmp_path / "t.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": r["text"], "answer": r["label"]}) + "\n" for r in make_rows(24))
    )
    out = tmp_path / "run"
    words = ["--model", model, "--task", "generate", "--train", path, "--method", method, "train.steps=2"]
    plan = json.loads(command("plan", *words, "--json").out)
    assert command("tune", *words, "train.precision=fp32", "--out", out).status == 0
    exported = command("export", out, "--to", tmp_path / "plain")
    refused = method == TIED
    assert (exported.status == 1 and "one tied weight" in exported.err) if refused else exported.status == 0
    for warnings in (plan["warnings"], json.loads((out / "plan.json").read_text())["warnings"]):
        told = [text for text in warnings if "cannot be exported" in text and "one tied weight" in text]
        assert bool(told) == refused
