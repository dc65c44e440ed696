"""Find out how much memory there is, and split work into smaller parts if it runs out."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from graftkit.backbone.memory import is_out_of_memory
from graftkit.errors import UserError, first_line

T = TypeVar("T")
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroup v2 and v1


def host_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its cgroup's limit, divided among the
    processes of a run on this machine."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in LIMITS:
        with suppress(OSError, ValueError):  # 'max' is not a number: no limit
            total = min(total, int(Path(path).read_text(encoding="ascii")))
    return total // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of the device, or of this process on a CPU, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> bool:
    """Let `peak_memory` count from now on; return whether that was possible: on a CPU this needs Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc
    except OSError:
        return False
    return peak_memory(device) < resident() + (64 << 20)  # some kernels take it and do nothing


class Peak:
    """The peak memory of a part of a process over what it held before, in bytes.

    On a GPU that of the allocator. On a CPU that of the resident pages, where the kernel can reset their peak (Linux);
    elsewhere the peak of the whole process, if it grew in that part. `before`: the peak of the process until then.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, peak_memory(device)
        if device.type == "cpu":
            release(device)  # freed blocks of earlier work would hide what the part takes
        now = held(device)
        self.exact = reset_peak_memory(device)
        self.held = now if self.exact else self.before

    def restart(self) -> None:
        """Forget the peak until now, but not what was held at the beginning."""
        release(self.device)
        if self.exact:
            reset_peak_memory(self.device)

    def over(self) -> int | None:
        """Return the peak since then over what was held then; None if that cannot be told."""
        over = peak_memory(self.device) - self.held
        return over if over > 0 else None

    def whole(self) -> int:
        """Return the peak of the process, before and since."""
        return max(self.before, peak_memory(self.device))


def held(device: torch.device) -> int:
    """Return the bytes of the tensors on a GPU, or of the resident pages of this process on a CPU."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident()


def resident() -> int:
    """Return the bytes of the resident pages of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
    except (OSError, ValueError, IndexError):
        return 0


def release(device: torch.device) -> None:
    """Release the cached memory of a device's allocator; on a CPU that of glibc's, where it is the one."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def in_parts(
    rows: np.ndarray, device: torch.device, work: Callable[[np.ndarray], T], advice: str
) -> Iterator[tuple[np.ndarray, T]]:
    """Do `work` on row numbers, all at once or, if memory runs out, in halves; yield each part with its result.

    Raises `UserError` with `advice` if a single row does not fit.
    """
    waiting = [rows]
    while waiting:
        part = waiting.pop()
        try:
            result = work(part)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise UserError(
                    f"a single row does not fit into the memory of {device} ({first_line(error)}); {advice}"
                ) from None
        else:
            yield part, result
            continue
        release(device)  # outside of `except`: the error keeps the tensors of the failed pass alive
        middle = (len(part) + 1) // 2
        waiting += [part[middle:], part[:middle]]
