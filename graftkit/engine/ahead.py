"""Prepare batches ahead of time, in a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Compute `make(step)` for the next steps while the current one runs.

    `make` is a pure function of the step, so running ahead changes nothing but the timing. Its exceptions are raised by
    `take`.
    """

    def __init__(self, make: Callable[[int], T], steps: int, depth: int = 2) -> None:
        self.make, self.steps, self.depth = make, steps, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if depth else None
        self._coming: dict[int, Future[T]] = {}

    def take(self, step: int) -> T:
        """Return the value for a step, and start computing the next ones."""
        if self._pool is None:
            return self.make(step)
        present = self._coming.pop(step, None) or self._pool.submit(self.make, step)
        for number in range(step + 1, min(step + 1 + self.depth, self.steps)):
            if number not in self._coming:
                self._coming[number] = self._pool.submit(self.make, number)
        return present.result()

    def close(self) -> None:
        """Cancel pending work and wait for what is running."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()
