"""Devices and processes. The only file that imports accelerate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def device() -> torch.device:
    """The device of this process, as accelerate chooses it (ACCELERATE_USE_CPU=true keeps to the CPU)."""
    from accelerate import PartialState

    return PartialState().device


def processes() -> tuple[int, int]:
    """(index of this process, number of processes)."""
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place; nothing to do for one process."""
    if processes()[1] == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
