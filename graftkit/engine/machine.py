"""What a measurement needs to know of the machine: the name of its processor or GPU, and when that is done."""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path

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


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
