"""Several processes train one graft: the same steps as one process that accumulates their batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import graft_tensors, tune_words
from processes import both, together

from graftkit.engine import kept, parallel
from graftkit.engine.predict import predict
from graftkit.tasks.base import Dataset

SETTINGS = ("train.steps=6", "train.batch_size=8", "train.checkpoint_every=2", "train.weight_decay=0.0")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]


@pytest.fixture
def still_bert(short_bert: Path, tmp_path: Path) -> Path:
    """The tiny BERT without dropout, whose random numbers differ from process to process."""
    folder = shutil.copytree(short_bert, tmp_path / "still-bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "method",
    [
        "lora(rank=4) + head()",
        "adalora(rank=4, target_rank=2) + head()",
        "gradual_unfreeze(2, 'steps', lr=0.001) + head()",
    ],
)
def test_two_processes_equal_one_that_accumulates(tmp_path, still_bert, rows_folder, command, method):
    both, alone = tmp_path / "both", tmp_path / "alone"
    first, second = together(*tune_words(still_bert, rows_folder, both, *SETTINGS, method=method), "--json")
    assert first.status == second.status == 0, first.err + second.err
    assert json.loads(first.out)["run"] == str(both) and not second.out  # one object, from one of them
    words = tune_words(still_bert, rows_folder, alone, *SETTINGS, "train.accumulate=2", method=method)
    assert command(*words).status == 0
    ours, theirs = graft_tensors(both), graft_tensors(alone)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()][:6]
        for folder in (both, alone)
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4)


def test_a_step_with_fewer_batches_than_processes(tmp_path, still_bert, rows_folder):
    """96 rows in batches of 40: the last step of an epoch has one batch for two processes."""
    words = tune_words(still_bert, rows_folder, tmp_path / "run", "train.epochs=2", "train.batch_size=40")
    ended = together(*words)
    assert [one.status for one in ended] == [0, 0], ended[0].err + ended[1].err
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [line["rows"] for line in steps if line["kind"] == "step"]
    assert len(rows) == 4 and sum(rows[:2]) == sum(rows[2:]) == 96


def test_batches_of_tokens_are_shared_out(tmp_path, still_bert, rows_folder, command):
    """Two processes take the steps of one that accumulates, also where the last step of an epoch has one batch."""
    losses = []
    for name, more in (("both", ()), ("alone", ("train.accumulate=2",))):
        words = tune_words(
            still_bert, rows_folder, tmp_path / name, "train.batch_tokens=150", "train.epochs=2", *more
        )
        words = [word for word in words if not word.startswith("train.batch_size")]
        ended = together(*words) if name == "both" else [command(*words)]
        assert all(one.status == 0 for one in ended), ended[0].err
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([(line["rows"], line["loss"]) for line in lines if line["kind"] == "step"])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4)


def test_their_folder_must_be_named(tmp_path, monkeypatch, still_bert, rows_folder):
    monkeypatch.chdir(tmp_path)
    words = tune_words(still_bert, rows_folder, Path("unused"), *SETTINGS)
    at = words.index("--out")
    for one in together(*words[:at], *words[at + 2 :]):
        assert one.status == 1 and "name it with --out" in one.err


def shares(folder: Path) -> None:
    """In each of two processes: predict the rows, fill a cache, and take values; write what comes of it."""
    index, world = parallel.processes()
    seen: list[int] = []

    class Rows(Dataset):
        def __init__(self):
            self.lengths = np.arange(1, 12)

        def __len__(self):
            return 11

    class Task:
        def outcomes(self, forward, batch):
            seen.extend(batch.rows.tolist())
            return [int(row) * 10 for row in batch.rows]

    forward = SimpleNamespace(device=torch.device("cpu"), graft=SimpleNamespace(model=torch.nn.Linear(1, 1)))
    outcomes = predict(Rows(), forward, Task(), 2)
    cache = kept.Kept(np.arange(1, 4), ragged=True)
    for row in range(index, 3, world):
        cache.put(np.array([row]), torch.full((1, row + 1, 2), row + 0.5))
    cache.exchange()
    weights = torch.full((3,), float(index))
    parallel.from_first([weights])
    found = [outcomes, seen, cache.get(np.arange(3)).sum((1, 2)).tolist(), weights.tolist(),
             parallel.all_agree(True), parallel.all_agree(index == 0)]  # fmt: skip
    (folder / f"found-{index}.json").write_text(json.dumps(found))


def test_evaluation_and_cache_are_shared_and_values_are_those_of_the_first(tmp_path):
    ended = both(lambda rank: shares(tmp_path))
    assert [one.status for one in ended] == [0, 0], ended[0].err + ended[1].err
    found = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("found-*.json"))]
    assert len(found) == 2
    seen = sorted(row for one in found for row in one[1])
    assert seen == list(range(11)), "each row once, in one of the processes"
    for outcomes, _, cached, weights, agreed, disagreed in found:
        assert outcomes == [10 * row for row in range(11)]
        assert cached == [1.0, 6.0, 15.0] and weights == [0.0] * 3
        assert agreed and not disagreed
