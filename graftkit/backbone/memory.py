"""Recognise out-of-memory errors."""

from __future__ import annotations

import errno
import re

import torch

# messages of allocators in errors other than torch.OutOfMemoryError
NO_MEMORY = re.compile(
    r"""
    out\ of\ memory                             # CUDA, HIP, XPU and MPS, drivers included
    | can't\ allocate\ memory                   # DefaultCPUAllocator on Linux and macOS
    | not\ enough\ memory                       # DefaultCPUAllocator on Windows
    | \b[A-Z]+_STATUS_\w*ALLOC(ATION)?_FAILED   # cuBLAS, cuDNN, cuSOLVER, cuSPARSE, and ROCm's
    | \bbad[_ ]alloc                            # std::bad_alloc; "bad allocation" on Windows
    | cannot\ allocate\ memory                 # ENOMEM, in what mmap and others raise
    | could\ not\ create\ a\ primitive\s*$      # oneDNN, which says no more when its memory runs out
    | Invalid\ buffer\ size                     # MPS, for one tensor that is larger than Metal allows
    """,
    re.VERBOSE | re.IGNORECASE,
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether this error, or one that it was raised from, means that the host or a device is out of memory.

    `torch.OutOfMemoryError` is a `RuntimeError`, so a handler of `RuntimeError` catches it too. Code that interprets a
    `RuntimeError` must check this first, and re-raise out-of-memory errors.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False
