"""train.schedule=wsd: its formula, the state kept before the decay, and longer runs that go on from it."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from conftest import equal_bits, graft_tensors, tune_words

from graftkit.optim.schedule import decay_start, factor

pytestmark = pytest.mark.slow

MODERN = (
    "train.schedule=wsd",
    "train.warmup=0",
    "train.decay=0.5",
    "train.step_in_backward=true",
    "train.clip=0.5",
)


def test_factors_are_those_of_the_paper():
    """Hägele et al. 2024: f(n, N, N_decay) = 1 - sqrt((n - (N - N_decay)) / N_decay) after warm-up and a constant rate."""
    total, warmup, decay = 200, 0.1, 0.25
    values = [factor(step, total, warmup, "wsd", decay) for step in range(total)]
    assert values[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert values[20:150] == [1.0] * 130 and decay_start(total, decay) == 150
    assert values[150:] == pytest.approx([1 - math.sqrt((step - 150) / 50) for step in range(150, 200)])
    assert all(0 < value <= 1 for value in values)
    assert factor(0, 1, 0.0, "wsd", 1.0) == 1.0 and decay_start(3, 0.01) == 2


@pytest.mark.slow
def test_a_longer_run_is_the_one_that_never_decayed(command, short_bert, rows_folder, tmp_path):
    """Weights, optimizer state and the norm of the step before are those of the moment before the decay."""

    def words(name: str, steps: int, *more: str) -> list[str]:
        given = [*MODERN, f"train.steps={steps}", *more]
        return tune_words(short_bert, rows_folder, tmp_path / name, *given, method="full(lr=0.001) + head()")

    assert command(*words("short", 8)).status == 0
    assert [path.name for path in (tmp_path / "short" / "before-decay").iterdir()] == [
        "step-00000004.safetensors"
    ]
    assert command(*words("whole", 12)).status == 0
    done = command(*words("longer", 12, f"train.from={tmp_path / 'short'}"))
    assert done.status == 0 and "goes on from step 4" in done.out
    assert equal_bits(graft_tensors(tmp_path / "longer"), graft_tensors(tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "longer" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(5, 13))

    fresh = command(*words("fresh", 12, f"train.from={tmp_path / 'short' / 'graft'}"))
    assert fresh.status == 0 and "goes on from" not in fresh.out
    assert not equal_bits(graft_tensors(tmp_path / "fresh"), graft_tensors(tmp_path / "whole"))

    start = f"train.from={tmp_path / 'short'}"
    for more, told in (
        (("train.steps=6",), "of 6 steps in all the decay would begin at step 3; train longer"),
        (
            ("train.optimizer=galore(rank=3)",),
            "with the state of adamw(), but train.optimizer is galore(rank=3)",
        ),
    ):
        refused = command(*words("refused", 12, start, *more))
        assert refused.status == 1 and told in refused.err, refused.err

    # killed before its first checkpoint, it goes on from there again
    shutil.rmtree(tmp_path / "longer" / "checkpoints")
    shutil.rmtree(tmp_path / "longer" / "graft")
    (tmp_path / "longer" / "result.json").unlink()
    assert command("tune", "--resume", tmp_path / "longer").status == 0
    assert equal_bits(graft_tensors(tmp_path / "longer"), graft_tensors(tmp_path / "whole"))


def test_more_than_the_whole_run_is_refused(command):
    words = ("tune", "--model", "m", "--train", "t.csv", "train.schedule=wsd")
    done = command(*words, "train.warmup=0.4", "train.decay=0.7")
    assert done.status == 1 and "train.warmup=0.4 and train.decay=0.7 are more than the whole run" in done.err
