"""Devices and processes. The only file that imports accelerate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


def _state() -> Any:
    """accelerate's view of this process. On a machine without an accelerator it must be told to use the CPU:
    else it takes each process that `torchrun` starts for the only one.
    """
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def device() -> torch.device:
    """The device of this process, as accelerate chooses it (ACCELERATE_USE_CPU=true keeps to the CPU)."""
    return _state().device


def processes() -> tuple[int, int]:
    """(index of this process, number of processes)."""
    state = _state()
    return state.process_index, state.num_processes


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place; nothing to do for one process."""
    if processes()[1] == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)


def sum_numbers(numbers: Sequence[float]) -> list[float]:
    """Each number added up over all processes."""
    if processes()[1] == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=device() if device().type == "cuda" else None)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def wait() -> None:
    """Go on when all processes have come here."""
    if processes()[1] > 1:
        torch.distributed.barrier()
