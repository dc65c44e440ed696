"""Freed memory is given back when a process has come to hold more of it than its passes need."""

from __future__ import annotations

import ctypes

import pytest
import torch

from graftkit.engine import heap
from graftkit.engine.heap import LEAST, Heap

CPU = torch.device("cpu")


class Process:
    """A process that holds `live` bytes and `freed` ones, and had a peak."""

    def __init__(self, monkeypatch) -> None:
        self.live, self.freed, self.peak, self.released = 1000 * LEAST, 0, 1000 * LEAST, []
        monkeypatch.setattr(heap, "private", lambda: self.live + self.freed)
        monkeypatch.setattr(heap, "peak_memory", lambda device: self.peak)
        monkeypatch.setattr(heap, "release", self.release)

    def release(self, device) -> None:
        self.released.append(self.freed)
        self.freed = 0

    def make_pass(self, needs: int, more: int = 0) -> None:
        """A pass that needs bytes, of which half stay in the heap when they are freed, `more` beside those of before."""
        self.peak = max(self.peak, self.live + self.freed + more + needs)
        self.freed = max(self.freed, needs // 2) + more


@pytest.fixture
def process(monkeypatch) -> Process:
    return Process(monkeypatch)


def made(process: Process, passes: list[tuple[int, int]]) -> Heap:
    guard = Heap(CPU)
    for needs, more in passes:
        process.make_pass(needs, more)
        guard.after_pass()
    return guard


def test_equal_passes_release_nothing(process):
    made(process, [(4 * LEAST, 0)] * 50)
    assert not process.released


def test_blocks_that_no_pass_uses_are_released(process):
    made(process, [(4 * LEAST, LEAST // 2)] * 40)
    assert process.released and max(process.released) <= 6 * LEAST
    assert process.freed <= 6 * LEAST


def test_what_lives_longer_does_not_count_twice(process):
    guard = made(process, [(4 * LEAST, 0)])
    process.live += 20 * LEAST  # libraries and kernels
    process.make_pass(4 * LEAST)
    guard.after_pass()
    assert len(process.released) == 1
    for _ in range(20):
        process.make_pass(4 * LEAST)
        guard.after_pass()
    assert len(process.released) == 1


def test_a_heavier_pass_raises_what_is_allowed(process):
    made(process, [(LEAST, 0), *[(40 * LEAST, 0), (LEAST, 0)] * 30])
    assert len(process.released) <= 2


def test_it_is_seen_in_a_process(tmp_path):
    """Blocks of this process, of which every second one is freed."""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("no glibc")
    guard, size, kept, most = Heap(CPU), 100_000, [], 0
    assert guard.on
    for _ in range(8):
        blocks = [bytearray(b"x" * size) for _ in range(LEAST // size)]
        kept += blocks[::2]
        del blocks
        most = max(most, heap.private() - guard.floor)
        guard.after_pass()
    assert most > LEAST and guard.floor > 0
    assert heap.private() - guard.floor <= 2 * LEAST


def test_on_other_devices_nothing_is_done(process):
    guard = Heap(torch.device("meta"))
    process.make_pass(100 * LEAST, 100 * LEAST)
    guard.after_pass()
    assert not guard.on and not process.released
