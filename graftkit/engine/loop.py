"""The training loop. It yields a `Step` after each optimizer step; everything else happens around it."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.backbone.anatomy import has_statistics
from graftkit.backbone.memory import is_out_of_memory
from graftkit.data.by_tokens import order_of, steps_of
from graftkit.data.order import Order
from graftkit.data.source import Batch, Pass, Source
from graftkit.engine import checkpoint
from graftkit.engine.ahead import Ahead
from graftkit.engine.audit import STEPS, Audit
from graftkit.engine.averaging import Average
from graftkit.engine.dropout import fast_dropout, seed_generator
from graftkit.engine.forward import Forward
from graftkit.engine.frozen import Phase, moving_now, set_training, spare_now
from graftkit.engine.heap import Heap
from graftkit.engine.joining import Joining, join
from graftkit.engine.memory import release
from graftkit.engine.parallel import from_first, processes, sum_gradients
from graftkit.engine.readings import TOGETHER, LateStep, Read, Reading, Readings, Step, can_skip, step_unless
from graftkit.engine.recompute import Recompute
from graftkit.engine.rounding import Rounding
from graftkit.engine.scaling import Scaled
from graftkit.engine.settings import Settings
from graftkit.engine.sums import Sums
from graftkit.engine.updates import AfterBackward, Updates, WithinBackward
from graftkit.errors import UserError, first_line
from graftkit.grafts.graft import Graft
from graftkit.optim.schedule import decay_start, factor
from graftkit.tasks.base import Learn, Terms

LOW = 0.01  # fraction of the learning rate below which a step may be too small to change a number


class NotFinite(UserError):
    """A loss or gradient was not finite; the weights were not changed."""


@dataclass(frozen=True)
class Work:
    """The batches of one step: row numbers of all processes, this process's batches, and units of each term in total."""

    rows: list[np.ndarray]
    own: list[Batch]
    units: dict[str, float]
    tokens: int


class Loop:
    """Iterate to train `graft` on a source from the current step to the last.

    `phases`: what is trained when. Parameters not yet trained have no gradient, so no optimizer state and no decay.
    """

    def __init__(self, graft: Graft, source: Source, forward: Forward, phases: Sequence[Phase],
                 learn: Learn, settings: Settings) -> None:  # fmt: skip
        self.graft = graft
        self.source = source
        self.forward = forward
        self.phases = phases
        self.learn = learn
        self.settings = settings
        self.parameters = graft.parameters  # the ones trained now
        self.step = 0
        self.optimizer = graft.optimizer(settings.lr, settings.weight_decay, settings.optimizer)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        after = Scaled if forward.precision == "fp16" else AfterBackward
        steps = WithinBackward if settings.step_in_backward else after
        rounding = Rounding(settings.seed) if settings.weight_type == "bf16" else None
        self.updates: Updates = steps(self.optimizer, settings.clip, rounding)
        self.index, self.world = processes()
        self.per_epoch = steps_of(source, settings, settings.accumulate * self.world)
        blocks = [graft.backbone.module(name) for name in graft.backbone.blocks]
        self.recompute = Recompute(blocks, settings.checkpointing)
        self.split = 1  # number of parts a batch is split into, after running out of memory
        self._order: tuple[int, Order] | None = None
        self.joining = Joining(graft.model)
        self.readings = Readings()
        self.together = TOGETHER if forward.device.type == "cuda" else 1  # steps that are read at a time
        from_first(graft.state.values())
        self.average = None if settings.ema is None else Average(graft.parameters, settings.ema)

    def __iter__(self) -> Generator[Step]:
        audit: Audit | None = None
        ahead = Ahead(self.work, self.settings.steps, 0 if self.forward.light else 2)
        heap = Heap(self.forward.device)
        try:
            for phase in self.phases:
                if self.step >= phase.end:
                    continue
                audit = self._enter(phase, audit)
                modules = self.graft.model.modules()
                lively = next((m for m in modules if m.training and not has_statistics(m)), None)
                while self.step < phase.end:
                    result = self._take_step(ahead.take(self.step), phase, audit)
                    if audit is not None and audit.done:
                        audit = None
                    yield result
                    heap.after_pass()
                    if lively is not None and not lively.training:  # an evaluation came in between
                        set_training(self.graft, phase.depth, phase.labels)
            self.graft.model.eval()
        finally:
            ahead.close()
            self._leave()

    def _enter(self, phase: Phase, audit: Audit | None) -> Audit | None:
        """Unfreeze exactly the parameters of a phase, and return the audit of the new ones."""
        self.recompute.leave()
        graft = self.graft
        everything = graft.parameters
        for name, parameter in everything.items():
            parameter.requires_grad_(name in phase.labels)
        self.parameters = {name: p for name, p in everything.items() if name in phase.labels}
        self.updates.enter(self.parameters)
        self.forward.enter(phase)
        set_training(graft, phase.depth, phase.labels)
        join(self.joining, self.source, self.forward, phase.depth)
        self.recompute.enter(phase.depth)
        moving, spare = moving_now(graft, phase.labels), spare_now(graft, phase.labels)
        if audit is not None:
            audit.free(phase.labels, moving, spare)
        elif self.step - phase.start < STEPS:
            before = [earlier.labels for earlier in self.phases if earlier.end <= phase.start]
            settled = before[-1] if before else ()
            moves_all = self.settings.optimizer.moves_all
            audit = Audit(graft.model, phase.labels, moving, settled, spare, moves_all)
        return audit

    def _leave(self) -> None:
        self.updates.leave()
        self.recompute.leave()
        self.joining.leave()
        for parameter in self.graft.parameters.values():
            parameter.requires_grad_(True)  # as `attach` left it

    def batches(self, step: int) -> list[np.ndarray]:
        """Return the row numbers of each batch of a step (0-based), over all processes."""
        epoch, position = divmod(step, self.per_epoch)
        order = self._order
        if order is None or order[0] != epoch:
            order = self._order = epoch, order_of(self.source, self.settings, epoch)
        width = self.settings.accumulate * self.world
        return order[1].batches(position * width, (position + 1) * width)

    def work(self, step: int) -> Work:
        """Make the batches of a step. A pure function of the step, as it runs ahead in another thread."""
        progress = step / max(1, self.settings.steps)
        return self.made(self.batches(step), Pass(self.settings.seed, step // self.per_epoch, progress))

    def made(self, rows: list[np.ndarray], at: Pass) -> Work:
        """Make the batches of a step from the row numbers of all processes."""
        units: dict[str, float] = {}
        for part in rows:
            for name, count in self.source.count(part, at).items():
                units[name] = units.get(name, 0.0) + count
        own = [self.source.batch(part, self.forward.device, at) for part in rows[self.index :: self.world]]
        for batch in own:
            self.forward.prepare(batch)
        tokens = sum(self.source.tokens(part) for part in rows)
        return Work(rows, own, {name: max(1.0, count) for name, count in units.items()}, tokens)

    def _take_step(self, work: Work, phase: Phase, audit: Audit | None) -> Step:
        settings = self.settings
        scale = factor(self.step, settings.steps, settings.warmup, settings.schedule, settings.decay)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * scale
        self.updates.begin(self.step, None if audit is None else audit.saw)
        sums = self._fitting_gradients(work)
        if audit is not None:
            audit.after_backward()
        reading = Reading(self.step, work, sums, self.updates.norm())
        late = self.together > 1 and audit is None and self._can_skip()
        flag = self.readings.add(reading)
        if late:
            step_unless(self.optimizer, flag, lambda: self.updates.step(self.updates.previous))
        else:
            self.updates.step(self._figures(reading).norm)
        self.joining.changed()
        self.step += 1
        if audit is not None:
            falling = (
                phase.start > 0 and scale < LOW
            )  # parameters unfrozen at the end may have almost no learning rate left
            audit.after_step(
                rising=self.step < settings.warmup * settings.steps or falling,
                last=self.step >= min(phase.start + self.per_epoch, settings.steps),
            )
        self.graft.after_step(self.step, settings.steps)
        if self.average is not None:
            self.average.update(self.step)
        self.optimizer.zero_grad()
        epoch, rows = self.step / self.per_epoch, sum(map(len, work.rows))
        told = ((), ()) if audit is None else (audit.unused, audit.zero)
        known: dict[str, Any] = {
            "number": self.step,
            "epoch": epoch,
            "lr_factor": scale,
            "rows": rows,
            "tokens": work.tokens,
        }
        if not late:
            read = self._figures(reading)
            figures: dict[str, Any] = {"loss": read.loss, "gradient_norm": read.norm, "terms": read.terms}
            return Step(**known, **figures, unused=told[0], zero=told[1])
        if len(self.readings.waiting) >= self.together or self.step >= settings.steps:
            self.settle()
        return LateStep(reading, self._figures, **known, unused=(), zero=())

    def _can_skip(self) -> bool:
        """Whether a step can be skipped by a flag on the device: nothing but the optimizer changes with it."""
        plain = type(self.updates) is AfterBackward and self.updates.alone is None and self.average is None
        follows = bool(self.graft.statistics) or any(m.reads_gradients for m in self.graft.method.methods)
        return plain and not follows and can_skip(self.optimizer)

    def _figures(self, reading: Reading) -> Read:
        """Return the figures of a step, read with those of all steps before. Raises `NotFinite`."""
        if reading.read is None:
            self.settle()
        assert reading.read is not None
        return reading.read

    def settle(self) -> None:
        """Read the figures of all steps taken. Raises `NotFinite` for the first that is not finite, with the weights and
        the position of before it.
        """
        for reading in self.readings.take():
            assert reading.read is not None
            loss, norm = reading.read.loss, reading.read.norm
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.step = reading.number
                self.optimizer.zero_grad()
                raise NotFinite(self._not_finite(loss, norm, reading.work))
            self.updates.previous = norm

    def _fitting_gradients(self, work: Work) -> Sums:
        """Compute the gradients of the step over all processes; again with a smaller scale of the loss if they overflow."""
        while True:
            sums = self._gradients(work)
            sum_gradients(self.parameters.values())
            if self.updates.fits():
                return sums
            self.optimizer.zero_grad()

    def _gradients(self, work: Work) -> Sums:
        """Compute the gradients of the step; if memory runs out, recompute activations, then halve the parts, and try again."""
        while True:
            try:
                return self._accumulate(work)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.updates.whole:
                    raise UserError(
                        f"a step does not fit into the memory of {self.forward.device} ({first_line(error)}), and cannot be split, "
                        "as train.step_in_backward takes it in one backward pass; lower train.batch_size or data.max_length, or use train.checkpointing=blocks."
                    ) from None
                largest = max(len(batch.rows) for batch in work.own)
                again = self.recompute.turn_on()
                if not again and self.split >= largest:
                    raise UserError(
                        f"a single row does not fit into the memory of {self.forward.device} ({first_line(error)}); lower "
                        "data.max_length or choose a method that trains fewer blocks."
                    ) from None
            self.split *= 1 if again else 2
            self.optimizer.zero_grad()
            release(self.forward.device)

    def _accumulate(self, work: Work) -> Sums:
        device = self.forward.device
        sums = Sums(work.units, device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            seed = self.settings.seed * 1_000_003 + self.step * self.world + self.index
            seed_generator(device, seed)
            with _numpy_seeded(seed), fast_dropout(device, self.settings.seed, self.step, self.index):
                batches = [part for whole in work.own for part in self._parts(whole)]
                for number, batch in enumerate(batches, start=1):
                    terms, last = self.learn(self.forward, batch), number == len(batches)
                    total = self._total(terms, work.units)
                    extra = self._extra() if self.updates.whole and last else None
                    self.updates.backward(total if extra is None else total + extra, last)
                    sums.add(terms)
            extra = None if self.updates.whole else self._extra()
            if extra is not None:
                self.updates.backward(extra)
        return sums

    def _extra(self) -> Tensor | None:
        """Return what the method adds to the loss; only in the first process, as gradients are summed over all."""
        extra = self.graft.extra_loss() if self.index == 0 else None
        return extra if extra is not None and extra.requires_grad else None

    def _parts(self, batch: Batch) -> list[Batch]:
        """Return the batch, or its parts if memory has run out before."""
        if self.split == 1 or len(batch.rows) == 1:
            return [batch]
        pieces = np.array_split(batch.rows, min(self.split, len(batch.rows)))
        return [self.source.batch(rows, batch.device, batch.at) for rows in pieces]

    def _total(self, terms: Terms, units: Mapping[str, float]) -> Tensor:
        """Return the contribution of a batch to the loss of the step."""
        if terms.keys() != units.keys():
            raise ValueError(
                f"the learner returns the terms {sorted(terms)}, but the source counts units of {sorted(units)}."
            )
        parts = [
            (term.losses.sum() / units[name]) * term.weight
            if term.weight != 1
            else term.losses.sum() / units[name]
            for name, term in terms.items()
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    @torch.no_grad()
    def _not_finite(self, loss: float, norm: float, work: Work) -> str:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        rows, guilty = np.concatenate(work.rows), []
        at = work.own[0].at if work.own else Pass()
        for part in work.rows:
            terms = self.learn(self.forward, self.source.batch(part, self.forward.device, at))
            bad = [~torch.isfinite(term.each()).cpu().numpy() for term in terms.values()]
            guilty += part[np.any(bad, axis=0)].tolist()
        named = sorted(guilty or rows.tolist())
        places = "; ".join(self.source.where(row) for row in named[:8])
        more = f"; and {len(named) - 8} more" if len(named) > 8 else ""
        which = "rows whose own loss is not finite" if guilty else "rows of the batch"
        changed = (
            "so the run stopped; layers above have taken the step already, but nothing of it is saved"
            if self.updates.whole and math.isfinite(loss)
            else "so the weights were not changed and the run stopped"
        )
        return (
            f"{what} in step {self.step + 1}, {changed}. {which}: "
            f"{places}{more}. Lower the learning rate (train.lr), check these rows, or use train.precision=fp32."
        )

    @property
    def before_decay(self) -> bool:
        """Whether the next step is the first in which the learning rate of the schedule 'wsd' may fall."""
        settings = self.settings
        starts = 0 < self.step == decay_start(settings.steps, settings.decay)
        return starts and settings.schedule == "wsd"

    @property
    def optimizer_bytes(self) -> int:
        """The bytes of all tensors in the optimizer's state, as allocated."""
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.numel() * value.element_size() for value in values if torch.is_tensor(value))

    def averaged(self) -> AbstractContextManager[None]:
        """Compute with the averages of the parameters inside a `with` block, if the run keeps them."""
        return nullcontext() if self.average is None else self.average.applied()

    def save(self, folder: Path, position: dict[str, Any]) -> None:
        """Write a checkpoint of the current step. Raises `NotFinite` if a step before was not finite."""
        self.settle()
        position = {**position, "gradient_norm": self.updates.previous, "scaling": self.updates.state}
        averages = None if self.average is None else self.average.values
        checkpoint.save(folder, self.step, self.graft.state, self.optimizer, position, averages)

    def restore(self, folder: Path) -> tuple[dict[str, Any] | None, list[checkpoint.Damaged]]:
        """Load the newest checkpoint that is whole; see `checkpoint.restore`."""
        averages = None if self.average is None else self.average.values
        position, damaged = checkpoint.restore(folder, self.graft.state, self.optimizer, averages)
        if position is not None:
            self.step = position["step"]
            self.updates.previous = position.get("gradient_norm", 0.0)
            self.updates.restore(position.get("scaling", {}))
        return position, damaged


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which some models draw masks from; on exit its previous state is restored."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
