"""Memory that runs out while evaluating, caching or predicting halves the work; how much there is to use."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import forked, make_rows, write_csv

from graftkit.engine import memory
from graftkit.engine.cached import CachedForward, make_forward
from graftkit.engine.memory import host_memory, in_parts
from graftkit.engine.predict import predict
from graftkit.errors import UserError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def test_work_is_halved_until_it_fits_and_each_row_is_done_once():
    done, tried = [], []

    def work(rows: np.ndarray) -> int:
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return int(rows.sum())

    for rows, total in in_parts(np.arange(11), CPU, work, "advice"):
        assert total == rows.sum()
        done += rows.tolist()
    assert done == list(range(11)) and tried[0] == 11


def test_one_row_that_does_not_fit_is_an_error_with_advice_and_other_errors_are_left_alone():
    def never(rows: np.ndarray) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(
        UserError, match=r"a single row does not fit into the memory of cpu \(.*\); take less"
    ):
        list(in_parts(np.arange(4), CPU, never, "take less"))

    def wrong(rows: np.ndarray) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(in_parts(np.arange(4), CPU, wrong, "take less"))


CPU_ERRORS = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    RuntimeError("could not create a primitive"),  # oneDNN, in a forward or backward pass
    RuntimeError("std::bad_alloc"),
    MemoryError("Unable to allocate 2.00 GiB for an array with shape (536870912,) and data type float32"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", CPU_ERRORS, ids=lambda error: str(error)[:20])
def test_memory_of_the_cpu_that_runs_out_in_a_step_halves_its_batches(ready, monkeypatch, error):
    run = ready("lora(rank=2) + head()", steps=1)
    plain = type(run.dataset).call

    def call(self, model, batch):
        if len(batch.rows) > 5:
            raise error
        return plain(self, model, batch)

    monkeypatch.setattr(type(run.dataset), "call", call)
    assert [step.rows for step in run.loop] == [16]
    assert run.loop.split == 4
    monkeypatch.setattr(type(run.dataset), "call", lambda *given: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=r"a single row does not fit into the memory of cpu \("):
        list(ready("lora(rank=2) + head()", steps=1).loop)


@pytest.mark.slow
def test_a_limit_of_the_operating_system(command, tiny_bert, tmp_path):
    """The real thing: no address space is left in the middle of a run."""
    rows = write_csv(tmp_path / "rows.csv", make_rows(256))

    def work():
        import resource

        from graftkit.cli.main import main
        from graftkit.engine.loop import Loop

        plain = Loop._gradients

        def gradients(self, work):
            if self.step == 1:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + 10_000_000, resource.RLIM_INFINITY))
            return plain(self, work)

        Loop._gradients = gradients
        out = tmp_path / "run"
        main([
            "tune", "--model", str(tiny_bert), "--task", "classify", "--train", str(rows), "--eval", "null",
            "--method", "full() + head()", "--out", str(out), "train.batch_size=256", "train.steps=3", "train.precision=fp32",
        ])  # fmt: skip

    done = forked(work)
    assert "Traceback" not in done.err
    assert done.status == 0 or (done.status == 1 and done.err.count("error: ") == 1), done.err


def limited(monkeypatch, source, most: int) -> list[int]:
    """A source whose batches of more than `most` rows run out of memory."""
    seen: list[int] = []
    plain = type(source).call

    def call(self, model, batch):
        seen.append(len(batch.rows))
        if len(batch.rows) > most:
            raise torch.OutOfMemoryError("out of memory")
        return plain(self, model, batch)

    monkeypatch.setattr(type(source), "call", call)
    return seen


def test_evaluation_and_prediction_go_on_in_smaller_parts(ready, monkeypatch):
    run = ready("lora(rank=2) + head()")
    task = run.prepared.rows.task
    whole = predict(run.dataset, run.forward, task, 32)
    seen = limited(monkeypatch, run.dataset, 5)
    parts = predict(run.dataset, run.forward, task, 32)
    assert max(seen) == 32 and min(seen) <= 5
    for left, right in zip(whole, parts):
        assert np.allclose(left, right, atol=1e-5)


def test_the_cache_is_filled_in_smaller_parts(ready, monkeypatch):
    run = ready("head(pooling='mean')")
    whole = make_forward(run.graft, CPU, "fp32", 3, run.dataset, passes=3)
    limited(monkeypatch, run.dataset, 7)
    parts = make_forward(run.graft, CPU, "fp32", 3, run.dataset, passes=3)
    assert isinstance(parts, CachedForward)
    torch.testing.assert_close(whole.kept.values, parts.kept.values)


def test_memory_is_that_of_the_cgroup_shared_by_the_processes_of_this_machine(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (str(limit),))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host_memory() == physical  # no such file
    limit.write_text("max\n")
    assert host_memory() == physical
    limit.write_text("1000000\n")
    assert host_memory() == 1_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_memory() == 250_000


def test_frozen_weights_are_digested_at_the_start_and_once_more(ready, monkeypatch):
    """However long a parameter keeps the audit waiting."""
    from graftkit.engine import audit

    count = {"now": 0}
    plain = audit.digest

    def digest(tensor):
        count["now"] += 1
        return plain(tensor)

    monkeypatch.setattr(audit, "digest", digest)
    run = ready("lora(rank=2) + head()", steps=6)
    model = run.graft.model
    name = next(name for name in run.graft.labels if name.endswith(".A"))
    model.get_parameter(name).register_hook(torch.zeros_like)  # no gradient but zeros: it stays undecided
    taken = []
    for _ in run.loop:
        taken.append(count["now"])
        count["now"] = 0
    saved = model.state_dict()
    tensors = len([*model.parameters()]) + sum(name in saved for name, _ in model.named_buffers())
    assert taken[0] == tensors and tensors - len(run.graft.labels) < taken[1] <= tensors
    assert all(later <= 2 for later in taken[2:]), taken
