"""Count what a computation on fake tensors does, and the bytes that are alive while it runs."""

from __future__ import annotations

import math
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graftkit.engine.dropout import Source
from graftkit.engine.machine import synchronize
from graftkit.plan.operations import ELEMENTWISE, Operation, operation_of, tensors

BLOCK = 512  # bytes that the allocators of GPUs round to
MAPPED = (
    32 << 20
)  # bytes from which glibc maps a block and gives it back when it is freed; smaller ones it keeps


class Counting(TorchDispatchMode):
    """Counts operations, and the live bytes of all storages that appear after it was entered.

    `peak`: the most bytes that were alive at once. `operations`: each kind of call with its number. Storages that exist
    before, such as weights, are registered with `ignore`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.now = self.peak = 0
        self.small = self.small_peak = self.large_peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor | tuple | list):  # questions such as that for a device
            return output
        self.operations[operation_of(func, args, kwargs, output)] += 1
        for tensor in tensors(output):
            self.see(tensor)
        return output

    def ignore(self, tensor: Tensor) -> None:
        """Count no byte of this tensor's storage."""
        storage = tensor.untyped_storage()
        self._alive[storage._cdata] = weakref.ref(storage, self._forget(storage._cdata, 0))

    def see(self, tensor: Tensor) -> None:
        """Count the bytes of a tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        if tensor.device.type != "cpu":
            size = -(-size // BLOCK) * BLOCK
        self._alive[key] = weakref.ref(storage, self._forget(key, size))
        self.add(size)

    def add(self, size: int) -> None:
        """Count bytes that no tensor shows, until `add` takes them off again."""
        self.now += size
        if abs(size) < MAPPED:
            self.small += size
        self.peak = max(self.peak, self.now)
        self.small_peak = max(self.small_peak, self.small)
        self.large_peak = max(self.large_peak, self.now - self.small)

    def restart(self) -> None:
        """Take what is alive now as nothing."""
        for key, held in list(self._alive.items()):
            storage = held()
            if storage is not None:
                self._alive[key] = weakref.ref(storage, self._forget(key, 0))
        self.now = self.peak = self.small = self.small_peak = self.large_peak = 0

    def _forget(self, key: int, size: int) -> Any:
        def freed(_: Any) -> None:
            self._alive.pop(key, None)
            if size:
                self.add(-size)

        return freed


class Timing(Counting):
    """Counts real operations, and times them. `seconds`: of each kind; `own`: those of counting itself. A GPU is waited for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.own = device, 0.0
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        begun = time.perf_counter()
        output = func(*args, **kwargs)
        synchronize(self.device)
        ended = time.perf_counter()
        if isinstance(output, Tensor | tuple | list):
            operation = operation_of(func, args, kwargs, output)
            self.operations[operation] += 1
            self.seconds[operation.kind] += ended - begun  # type: ignore[assignment]
        self.own += time.perf_counter() - ended
        return output


class Shapes(Source):
    """What `fast_dropout` draws its masks from, without numbers: tensors of the right shapes, and the bytes that NumPy takes
    on the way."""

    def __init__(self, counting: Counting) -> None:
        super().__init__(0)
        self.counting = counting

    def keep(self, shape: torch.Size, p: float) -> Tensor:
        with self._drawing(shape):
            return torch.empty(shape, dtype=torch.bool)

    def factors(self, shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
        with self._drawing(shape):
            return torch.empty(shape, dtype=dtype)

    def again(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def _drawing(self, shape: torch.Size) -> Iterator[None]:
        """Count 16 random bits and a boolean for each number, while these exist."""
        count = math.prod(shape)
        drawn = Operation(ELEMENTWISE, "graftkit::keep", torch.int16, (count,), 0.0, 3.0 * count)
        self.counting.operations[drawn] += 1
        self.counting.add(3 * count)
        try:
            yield
        finally:
            self.counting.add(-3 * count)
