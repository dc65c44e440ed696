"""Errors for want of memory are told from errors that mean something else."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from graftkit.backbone.memory import is_out_of_memory
from graftkit.data.packing import leaks
from graftkit.errors import UserError
from graftkit.runs import inspect, prepare
from graftkit.tasks.audio_classify.rows import SoundDataset


def raised(made) -> BaseException:
    with pytest.raises(BaseException) as caught:
        made()
    return caught.value


def test_what_allocators_of_this_machine_raise():
    assert is_out_of_memory(raised(lambda: torch.empty(10**17)))
    assert is_out_of_memory(raised(lambda: np.empty(10**16)))
    assert is_out_of_memory(raised(lambda: torch.ones(3).repeat(10**17)))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.83 GB, max allowed: 9.07 GB)."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"),
    ],
    ids=str,
)  # fmt: skip
def test_what_other_allocators_raise(error):
    assert is_out_of_memory(error)
    wrapped = ValueError("the step failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("unsupported operation: more than one element refers to a single memory location."),
        RuntimeError("Calculated padded input size per channel: (1). Kernel size: (3)."),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        ValueError("out of memory, says a label"),
        KeyError("memory"),
        None,
    ],
    ids=str,
)
def test_other_errors_are_not_for_want_of_memory(error):
    assert not is_out_of_memory(error)


class Full(torch.nn.Module):
    """Raises the same error at each call."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.error = error

    def forward(self, **inputs):
        raise self.error


def test_a_probe_that_runs_out_of_memory_says_nothing_about_packing():
    parts = [np.arange(4), np.arange(5)]
    with pytest.raises(torch.OutOfMemoryError):
        leaks(Full(torch.OutOfMemoryError("no room")), parts)
    assert "positions that restart" in str(leaks(Full(RuntimeError("bad positions")), parts))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("no room"), "does not fit into memory; reduce its size"),
        (RuntimeError("Storage size calculation overflowed with sizes=[3]"), "does not fit into memory"),
        (RuntimeError("more than one element refers to a single memory location"), None),
        (RuntimeError("a hook was allocated twice"), None),
    ],
    ids=str,
)
def test_attaching_advises_lower_sizes_only_for_want_of_memory(monkeypatch, error, told):
    def attach(*values, **options):
        raise error

    monkeypatch.setattr(prepare, "attach", attach)
    backbone = SimpleNamespace(model=torch.nn.Linear(1, 1))
    with pytest.raises(UserError if told else RuntimeError, match=told or str(error)):
        prepare.attach_new(backbone, "lora()", meta=False)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("Tried 2 GiB."), MemoryError("Tried 2 GiB.")], ids=str
)
def test_the_command_line_says_it_without_a_traceback(command, monkeypatch, error):
    def empty(*values, **options):
        raise error

    monkeypatch.setattr(inspect, "inspect_model", empty)
    done = command("inspect", "some-model")
    assert done.status == 1
    assert done.err.startswith("error: out of memory; lower train.batch_size") and "Tried 2 GiB." in done.err


def test_sounds_are_not_too_short_for_want_of_memory(monkeypatch):
    def batch(*values):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(SoundDataset, "batch", batch)
    sounds = SoundDataset.__new__(SoundDataset)
    sounds.lengths, sounds.front = np.array([100]), SimpleNamespace(shortest=1)
    with pytest.raises(torch.OutOfMemoryError):
        sounds._misfit(SimpleNamespace(model=torch.nn.Linear(1, 1)), 0)
