"""Passes of a run ahead of it, on its own model and rows, to see what they take. They leave no trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone.walk import modules_of
from graftkit.data.source import Batch, Pass, Source
from graftkit.engine.forward import Forward, evaluating
from graftkit.engine.frozen import Phase
from graftkit.engine.loop import Loop
from graftkit.engine.machine import same_random_states, synchronize
from graftkit.engine.memory import held, peak_memory, release, reset_peak_memory
from graftkit.engine.settings import Settings
from graftkit.engine.starts import Start
from graftkit.engine.updates import AfterBackward
from graftkit.grafts.graft import Graft
from graftkit.tasks.base import Learn, Terms

COPIED = 1 << 21  # numbers, at most, of the parameters whose copies an optimizer takes a step with
MOST_BUFFERS = 256e6  # bytes of buffers, above which no copy of them is kept
PLAIN = (bool, int, float, str, type(None), torch.Tensor)


@dataclass(frozen=True)
class Taken:
    """What a pass took. `size`: that of its batch; `seconds`, and of them those of the forward pass; `prepare`: seconds to make
    the batch; `peak`: bytes over what was held before it; `kept`: bytes that the process holds on to after it, such as
    libraries and compiled kernels."""

    size: float
    seconds: float
    forward: float
    prepare: float
    peak: int
    kept: int


class Trial(Loop):
    """A loop whose steps end with their gradients: nothing is updated.

    `start`: where passes start, if what comes before is cached; its values are computed here before a step is timed.
    `hold`: there are gradients of other batches already, as between the batches of a step.
    """

    def __init__(
        self, graft: Graft, source: Source, forward: Forward, phase: Phase, learn: Learn, settings: Settings,
        start: Start | None = None,
    ) -> None:  # fmt: skip
        self.middle: Callable[[], None] = lambda: None
        self.start, self.plain = start, forward
        used = forward if start is None else _Captured(forward, start)
        alone = replace(settings, ema=None, step_in_backward=False)
        super().__init__(graft, source, used, [phase], self._timed(learn), alone)
        self.updates = _Dropping(self.optimizer, settings.step_in_backward)
        self.hold = settings.accumulate > 1
        self.forwarded = 0.0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let the parameters of the phase be trained, and leave everything as it was."""
        device = self.forward.device
        with undisturbed(self.graft.model, device):
            try:
                self._enter(self.phases[0], None)
                for parameter in self.parameters.values() if self.hold else ():
                    parameter.grad = torch.zeros_like(parameter)
                yield
            finally:
                self._leave()
                self.optimizer.zero_grad()

    def _timed(self, learn: Learn) -> Learn:
        def timed(forward: Any, batch: Batch) -> Terms:
            terms = learn(forward, batch)
            synchronize(self.forward.device)
            self.forwarded = time.perf_counter()
            self.middle()
            return terms

        return timed

    def batch(
        self, rows: np.ndarray, size: float, around: AbstractContextManager | None = None, alone: bool = True
    ) -> Taken:  # fmt: skip
        """Make the forward and backward pass of a batch of a step. `alone`: freed memory is given back before and after it, so that
        its own shows; otherwise it runs as the steps of a run do, and no memory is told."""
        begun = time.perf_counter()
        work = self.made([rows], Pass(self.settings.seed))
        prepare = time.perf_counter() - begun

        def step() -> None:
            self._gradients(work)
            if not self.hold:
                self.optimizer.zero_grad()

        return self._taken(size, prepare, step, around, alone)

    def evaluation(self, source: Source, rows: np.ndarray, size: float) -> Taken:
        """Make the forward pass of a batch of rows without gradients."""
        batch = source.batch(rows, self.forward.device)
        self.forward.prepare(batch)
        with torch.no_grad(), evaluating(self.graft.model):
            return self._taken(size, 0.0, lambda: self.forward(batch))

    def filling(self, source: Source, rows: np.ndarray, size: float, alone: bool = True) -> Taken:
        """Compute what is cached of a batch of rows. `alone`: as in `batch`."""
        assert self.start is not None
        start, begun = self.start, time.perf_counter()
        batch = source.batch(rows, self.forward.device, Pass(self.settings.seed))
        batch.prepare(True)
        prepare = time.perf_counter() - begun
        with torch.no_grad(), evaluating(self.graft.model):
            return self._taken(size, prepare, lambda: start.capture(self.plain, batch), alone=alone)

    def update(self) -> float:
        """Return the seconds of clipping and of a step of the optimizer, from one with copies of some parameters."""
        groups = self.graft.param_groups(self.settings.lr, self.settings.weight_decay)
        whole, copied, room = 0, 0, COPIED
        chosen: list[dict[str, Any]] = []
        for group in groups:
            places: list[int] = []
            for place, parameter in enumerate(group["params"]):
                count = parameter.numel() if parameter.requires_grad else 0
                whole += count
                if 0 < count <= room:
                    places, room, copied = [*places, place], room - count, copied + count
            lists = {k: [v[i] for i in places] for k, v in group.items() if isinstance(v, list)}
            lists["params"] = [nn.Parameter(p.detach().clone()) for p in lists["params"]]
            chosen += [group | lists] if places else []
        if not chosen:
            return 0.0
        optimizer, parameters = (
            self.settings.optimizer.make(chosen),
            [p for group in chosen for p in group["params"]],
        )
        seconds = 0.0
        for _ in range(2):  # the first one makes the states
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            seconds = self._seconds(lambda: _update(optimizer, parameters, self.settings.clip))
        return seconds * whole / copied

    def _taken(
        self, size: float, prepare: float, work: Callable[[], Any], around: AbstractContextManager | None = None,
        alone: bool = True,
    ) -> Taken:  # fmt: skip
        device = self.forward.device
        if not alone:
            begun = time.perf_counter()
            seconds = self._seconds(work)
            return Taken(size, seconds, max(0.0, self.forwarded - begun), prepare, 0, 0)
        release(device)
        before = held(device)
        reset_peak_memory(device)
        begun = time.perf_counter()
        with around or nullcontext():
            seconds = self._seconds(work)
        peak = peak_memory(device) - before
        release(device)
        forward = max(0.0, self.forwarded - begun)
        return Taken(size, seconds, forward, prepare, max(0, peak), max(0, held(device) - before))

    def _seconds(self, work: Callable[[], Any]) -> float:
        device = self.forward.device
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - begun


def _update(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, clip or float("inf"))
    optimizer.step()
    optimizer.zero_grad()


class _Dropping(AfterBackward):
    """Updates that never come. `freed`: each gradient is freed as soon as it is complete, as in steps within the backward pass."""

    def __init__(self, optimizer: torch.optim.Optimizer, freed: bool) -> None:
        super().__init__(optimizer, 0.0)
        self.freed, self.handles = freed, []  # type: ignore[var-annotated]

    def enter(self, parameters: Any) -> None:
        super().enter(parameters)
        for parameter in parameters.values() if self.freed else ():
            self.handles.append(parameter.register_post_accumulate_grad_hook(_free))

    def leave(self) -> None:
        super().leave()
        for handle in self.handles:
            handle.remove()
        self.handles = []


def _free(parameter: Tensor) -> None:
    parameter.grad = None


class _Captured(Forward):
    """The forward pass from values that are computed when a batch is prepared, in place of a cache."""

    def __init__(self, plain: Forward, start: Start) -> None:
        super().__init__(plain.graft, plain.device, plain.precision)
        self.plain, self.start = plain, start

    def __call__(self, batch: Batch) -> Tensor:
        assert batch.fetched is not None
        return self.start.resume(self.plain, batch, batch.fetched[1])

    def prepare(self, batch: Batch) -> None:
        batch.prepare(True)
        with torch.no_grad(), evaluating(self.graft.model):
            batch.fetched = self, self.start.capture(self.plain, batch).clone(), None


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """On exit, all random states, buffers and gradients are those of before, bit for bit, and so are the plain attributes of
    modules, such as their modes.

    Raises `ValueError` if the buffers are too large to be copied.
    """
    modules = set(modules_of(model).values())
    buffers = {
        id(b): (b, b.detach().clone()) for b in _small({b for m in modules for b in m._buffers.values() if b is not None})
    }  # fmt: skip
    entries = [(m, dict(m._buffers), {k: v for k, v in vars(m).items() if isinstance(v, PLAIN)}) for m in modules]  # fmt: skip
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        with same_random_states(device):
            yield
    finally:
        with torch.no_grad():
            for buffer, copy in buffers.values():
                buffer.copy_(copy)
        for module, own, plain in entries:
            module._buffers.update(own)
            vars(module).update(plain)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _small(buffers: set[Tensor]) -> set[Tensor]:
    size = sum(buffer.nbytes for buffer in buffers)
    if size > MOST_BUFFERS:
        raise ValueError(f"the model's buffers take {size / 1e6:,.0f} MB")
    return buffers
