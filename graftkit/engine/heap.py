"""Give back the freed memory that glibc's malloc keeps on a CPU, before there is much of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from graftkit.engine.memory import peak_memory, release

ALLOWED = 1.0  # times what a pass takes from memory without freed blocks, which a process may have come to hold after one
RAISED = 1.05  # times as much is allowed after each release, so that there are few of them
LEAST = 64 << 20  # bytes, which malloc trims by itself


class Heap:
    """The private memory of a process that makes one pass after another, such as steps of a training loop.

    Kernels that are compiled, and libraries that are loaded, during a pass come to lie between its blocks. These are freed at its
    end, but the next pass, of other sizes, finds too few that fit, and takes new memory: a process may come to hold twice what its
    passes need. Giving freed blocks back costs a pass some time, since they have to be taken again. So it is done only when
    more is held than a pass has needed. On a GPU, and without glibc, nothing is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on = device, device.type == "cpu" and private() > 0
        self.floor = private()  # bytes that are held without freed blocks
        self.largest = 0  # bytes over the floor that a pass has taken
        self.clean = True  # no freed blocks were held before the pass that is made now
        self.last, self.peak = self.floor, peak_memory(device)

    def after_pass(self) -> None:
        """Release freed blocks if there are many."""
        if not self.on:
            return
        now, clean = private(), self.clean
        taken = now - self.last  # at least that much, of new memory
        if clean:
            taken, self.clean = max(taken, peak_memory(self.device) - self.peak), False
        self.largest = max(self.largest, taken, LEAST)
        if not clean and now - self.floor > ALLOWED * self.largest:
            release(self.device)
            now = self.floor = private()
            self.clean, self.peak = True, peak_memory(self.device)
            self.largest = int(RAISED * self.largest)
        self.last = now


def private() -> int:
    """Return the resident bytes of this process that no file and no other process shares; 0 where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    return 0
