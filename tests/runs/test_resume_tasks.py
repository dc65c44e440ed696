"""A run of any modality that is killed and resumed ends with the same graft, bit for bit."""

from __future__ import annotations

import pytest
from killing import assert_same, killed, resume
from task_cases import CASES, material

pytestmark = pytest.mark.sampled


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_killed_and_resumed(case, short_bert, tmp_path, command):
    task, method, (moment, number) = CASES[case]
    model, train = material(case, tmp_path, short_bert)
    words = [
        "tune", "--model", str(model), "--task", task, "--train", str(train), "--eval", "0.25", "--method", method,
        "train.precision=fp32", "train.batch_size=8", "train.lr=0.01", "train.steps=5", "train.checkpoint_every=1",
        "train.evaluate_every=3", *(["data.max_length=60"] if case == "generate" else []),
    ]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = command(*words, "--out", whole)
    assert done.status == 0, done.err
    killed(moment, number, [*words, "--out", str(broken)])
    assert not (broken / "result.json").exists()
    resume(broken)
    assert_same(broken, whole)
