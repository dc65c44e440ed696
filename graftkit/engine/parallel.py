"""Devices and processes. Besides tracking.py, the only file that imports accelerate."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graftkit.errors import UserError
from graftkit.recipe.environment import check_processes

T = TypeVar("T")


def _state() -> Any:
    """Return accelerate's view of this process. On a machine without an accelerator it must be told to use the CPU:
    otherwise it takes each process that `torchrun` starts for the only one.
    """
    from accelerate import PartialState

    check_processes()
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes > 1:
        _leave_at_exit()
    return state


@functools.cache
def _leave_at_exit() -> None:
    """Take leave of the other processes at exit: threads of the connection that are still there then abort the process."""
    atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())


def device() -> torch.device:
    """Return the device of this process, as chosen by accelerate (ACCELERATE_USE_CPU=true selects the CPU)."""
    return _state().device


def processes() -> tuple[int, int]:
    """Return (index of this process, number of processes)."""
    state = _state()
    return state.process_index, state.num_processes


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of all processes, in place; a no-op for one process."""
    if processes()[1] == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)


def sum_numbers(numbers: Sequence[float]) -> list[float]:
    """Sum each number over all processes."""
    if processes()[1] == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def sum_tensor(values: Tensor) -> Tensor:
    """Sum a tensor on this process's device over all processes, in place."""
    if processes()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """Return the values of all processes, in process order. Values must be picklable."""
    world = processes()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, value)
    return found


def all_agree(yes: bool) -> bool:
    """Return whether `yes` is true in all processes."""
    return all(gather(yes))


def from_first(tensors: Iterable[Tensor]) -> None:
    """Broadcast the first process's values to all, in place, so that all start from the same values."""
    if processes()[1] == 1:
        return
    for tensor in tensors:
        held = tensor.detach().to(device())
        torch.distributed.broadcast(held, 0)
        tensor.data.copy_(held)


def add_up(values: Tensor, chunk: int = 1 << 24) -> None:
    """Sum a host tensor over all processes, in place and piece by piece."""
    if processes()[1] == 1:
        return
    flat = values.view(-1)
    for start in range(0, len(flat), chunk):
        piece = flat[start : start + chunk].to(device())
        torch.distributed.all_reduce(piece)
        flat[start : start + chunk] = piece.cpu()


def wait() -> None:
    """Wait until all processes have reached this point."""
    if processes()[1] > 1:
        torch.distributed.barrier()


def in_first(work: Callable[[], T]) -> T | None:
    """Do `work` in the first process while the others wait. Return its result there, and None in the others.

    If it raises, all processes stop: the first with that error, the others with a `UserError`.
    """
    result, error = None, None
    if processes()[0] == 0:
        try:
            result = work()
        except BaseException as raised:  # raised again below, once the others know
            error = raised
    failed = sum_numbers([float(error is not None)])[0] > 0
    if error is not None:
        raise error
    if failed:
        raise UserError("the first process failed to start; see its error message.")
    return result
