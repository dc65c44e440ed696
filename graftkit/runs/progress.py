"""Small parts of a training run: running means for its progress line, when an evaluation is due, and signals to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graftkit.engine.loop import Step
from graftkit.report.console import Console


def due(every: int | str, step: Step, per_epoch: int, total: int) -> bool:
    """Return whether an evaluation follows a step. `every`: `train.evaluate_every`."""
    if step.number == total:
        return True
    if every == "end":
        return False
    if isinstance(every, str):  # 'epoch', or '2 epochs'
        every = per_epoch * int("".join(filter(str.isdigit, every)) or 1)
    return step.number % every == 0


class Smooth:
    """Running means for the progress line, over the steps whose figures are known; no accuracy if the task has none in
    training."""

    def __init__(self) -> None:
        self.waiting: list[Step] = []
        self.loss = self.weight = 0.0
        self.accuracy: float | None = 0.0

    def add(self, step: Step) -> None:
        self.waiting.append(step)
        while self.waiting and self.waiting[0].known:
            self._add(self.waiting.pop(0))

    def _add(self, step: Step) -> None:
        self.weight = 0.98 * self.weight + 0.02
        share = 0.02 / self.weight
        self.loss += share * (step.loss - self.loss)
        if step.accuracy is None or self.accuracy is None:
            self.accuracy = None
        else:
            self.accuracy += share * (step.accuracy - self.accuracy)

    def show(self, console: Console, step: Step, total: int, left: float | None) -> None:
        """Show the progress of a run of `total` steps, of which `left` seconds are left."""
        console.step(step.number, total, step.epoch, self.loss, self.accuracy, step.rows, left)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and SIGHUP (a closed terminal) instead of being interrupted within a step.

    A second one interrupts at once.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
