"""The loss and norm of steps, which stay on the device until somebody asks for them.

Reading them waits for the device, and while the host waits it prepares nothing. On a GPU the figures of several steps are
therefore read together. A step that is not finite must not change the weights, though nobody has read that: the flag of it
is on the device too, and a fused optimizer skips its step by it (`found_inf`, made for loss scaling). The flag stays set, so
the steps after it are skipped as well, until it is read and the run stops with the weights of before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftkit.engine.parallel import sum_tensor
from graftkit.engine.sums import Figures, Sums

TOGETHER = 8  # steps that are read at a time on a GPU


@dataclass(frozen=True)
class Read:
    """The figures of a step as numbers."""

    loss: float
    norm: float
    terms: Mapping[str, Figures]


class Reading:
    """The figures of the step with this number, from 0, on the device. `work`: its batches."""

    def __init__(self, number: int, work: Any, sums: Sums, norm: Tensor) -> None:
        found = sum_tensor(
            torch.stack([*sums.losses.values(), *sums.correct.values(), *sums.counted.values()])
        )
        self.number, self.work, self.sums = number, work, sums
        self.values = torch.cat([found, norm.detach().to(found).reshape(1)])
        self.read: Read | None = None

    def decode(self, values: list[float]) -> Read:
        """Return the figures from their numbers."""
        names, units = list(self.sums.losses), self.work.units
        count = len(names)
        terms = {
            name: Figures(loss / units[name], units[name], correct / units[name] if counted else None)
            for name, loss, correct, counted in zip(names, values, values[count:], values[2 * count :])
        }
        loss = sum(self.sums.weights[name] * one.loss for name, one in terms.items())
        return Read(loss, values[-1], terms)


class Readings:
    """The steps that are not read yet, in order, and the flag that one of them is not finite."""

    def __init__(self) -> None:
        self.waiting: list[Reading] = []
        self.flag: Tensor | None = None

    def add(self, reading: Reading) -> Tensor:
        """Keep a step for later, and return the flag: 1.0 if it or one before it is not finite."""
        bad = (~reading.values.isfinite().all()).float()
        self.flag = bad if self.flag is None else torch.maximum(self.flag, bad)
        self.waiting.append(reading)
        return self.flag

    def take(self) -> list[Reading]:
        """Read all steps in one transfer and return them."""
        waiting, self.waiting = self.waiting, []
        if waiting:
            for reading, values in zip(waiting, torch.stack([one.values for one in waiting]).tolist()):
                reading.read = reading.decode(values)
        return waiting


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer skips a step by a flag on the device."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and isinstance(optimizer, torch.optim.Adam)  # AdamW is one


def step_unless(optimizer: torch.optim.Optimizer, flag: Tensor, step: Callable[[], None]) -> None:
    """Take a step that changes neither values nor state if the flag is 1."""
    optimizer.found_inf = flag  # type: ignore[attr-defined]
    try:
        step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Step:
    """One optimizer step: its 1-based number, its loss (the weighted sum of its terms' means) and the gradient norm.

    `unused`: parameters that turned out not to affect the output; `zero`: those whose gradient was zero throughout the
    first epoch. `known`: whether its figures can be had without waiting for the device.
    """

    known: ClassVar[bool] = True
    number: int
    epoch: float
    loss: float
    gradient_norm: float
    lr_factor: float
    rows: int
    tokens: int
    terms: Mapping[str, Figures] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """The accuracy of the first term that has one."""
        return next((f.accuracy for f in self.terms.values() if f.accuracy is not None), None)


class LateStep(Step):
    """A step whose loss, norm and terms are read from the device when they are asked for."""

    def __init__(self, reading: Reading, read: Callable[[Reading], Read], **known: Any) -> None:
        vars(self).update(known, reading=reading, _read=read)

    @property
    def known(self) -> bool:  # type: ignore[override]
        return vars(self)["reading"].read is not None

    loss = property(lambda self: self._read(self.reading).loss)  # type: ignore[assignment]
    gradient_norm = property(lambda self: self._read(self.reading).norm)  # type: ignore[assignment]
    terms = property(lambda self: self._read(self.reading).terms)  # type: ignore[assignment]
