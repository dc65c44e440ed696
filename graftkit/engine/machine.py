"""What a measurement needs of the machine: the name of its processor or GPU, when that is done, and random states as they were."""

from __future__ import annotations

import hashlib
import platform
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


def hardware(device: torch.device) -> str:
    """Return the name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*: *(.+)$", _cpu_info(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def cpu_name() -> str:
    """Return the name of this machine's processor with a digest of its instruction sets, which virtual machines hide."""
    lines = _cpu_info().splitlines()
    wanted = [
        line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "model\t", "flags"))
    ]
    if not wanted:
        return platform.processor() or platform.machine()
    return f"{wanted[0]} {hashlib.sha256(' '.join(wanted[:3]).encode()).hexdigest()[:8]}"


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


@contextmanager
def same_random_states(device: torch.device) -> Iterator[None]:
    """On exit, the random states of torch, NumPy and Python are those of before."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
