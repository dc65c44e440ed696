"""Devices and processes. The only file that imports accelerate, beside tracking.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graftkit.errors import UserError

T = TypeVar("T")


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
    sums = torch.tensor(numbers, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def sum_tensor(values: Tensor) -> Tensor:
    """A tensor on this process's device added up over all processes, in place."""
    if processes()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of these; any that can be pickled, exchanged within one run."""
    world = processes()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, value)
    return found


def all_agree(yes: bool) -> bool:
    """Whether all processes say yes."""
    return all(gather(yes))


def from_first(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values of the first one, in place, so that they start from the same."""
    if processes()[1] == 1:
        return
    for tensor in tensors:
        held = tensor.detach().to(device())
        torch.distributed.broadcast(held, 0)
        tensor.data.copy_(held)


def add_up(values: Tensor, chunk: int = 1 << 24) -> None:
    """Add up a tensor on the host over all processes, in place and piece by piece."""
    if processes()[1] == 1:
        return
    flat = values.view(-1)
    for start in range(0, len(flat), chunk):
        piece = flat[start : start + chunk].to(device())
        torch.distributed.all_reduce(piece)
        flat[start : start + chunk] = piece.cpu()


def wait() -> None:
    """Go on when all processes have come here."""
    if processes()[1] > 1:
        torch.distributed.barrier()


def in_first(work: Callable[[], T]) -> T | None:
    """Do `work` in the first process while the others wait; its result there, None in the others.

    Where it raises, all processes stop: the first with that error, the others with a `UserError`.
    """
    result, error = None, None
    if processes()[0] == 0:
        try:
            result = work()
        except BaseException as raised:  # raised again below, when the others know
            error = raised
    failed = sum_numbers([float(error is not None)])[0] > 0
    if error is not None:
        raise error
    if failed:
        raise UserError("the first process could not begin; its own message says why.")
    return result
