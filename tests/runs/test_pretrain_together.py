"""`graftkit pretrain` in two processes: the same model as from one that accumulates their batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import graft_tensors
from objectives import write_texts
from processes import together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]


def words(texts: Path, out: Path, *more: str) -> list[str]:
    return [
        "pretrain", "--objective", "causal", "--train", str(texts), "--size", "llama-tiny", "--vocabulary", "280",
        "--out", str(out), "train.steps=3", "train.batch_size=4", "train.precision=fp32", "data.max_length=24", "--json", *more,
    ]  # fmt: skip


def test_two_processes_equal_one_that_accumulates(tmp_path, command, monkeypatch):
    """They share a tokenizer, a random model and the tokens of the corpus, which one of them makes. A Llama has no dropout."""
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    texts = write_texts(tmp_path / "texts.txt", 40)
    both, alone = tmp_path / "both", tmp_path / "alone"
    first, second = together(*words(texts, both))
    assert first.status == second.status == 0, first.err + second.err
    assert not second.out
    found = json.loads(first.out)
    done = command(*words(texts, alone, "train.accumulate=2"))
    assert done.status == 0, done.err
    wanted = json.loads(done.out)
    assert found["tokens"] == wanted["tokens"]
    for name in ("loss", "bits_per_byte", "token_accuracy"):
        assert found["metrics"][name] == pytest.approx(wanted["metrics"][name], rel=1e-4)
    ours, theirs = graft_tensors(both), graft_tensors(alone)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def test_steps_within_the_backward_pass_are_for_one_process(tmp_path):
    texts = write_texts(tmp_path / "texts.txt", 10)
    for one in together(*words(texts, tmp_path / "run", "train.step_in_backward=true")):
        assert (
            one.status == 1 and "there are 2: their gradients are summed after the backward pass" in one.err
        )
