"""The training loop. It yields a `Step` after each optimizer step; everything else happens around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftkit.backbone.anatomy import has_statistics
from graftkit.data.batches import epoch_batches, ordered_batches, steps_per_epoch
from graftkit.engine import checkpoint
from graftkit.engine.audit import STEPS, Audit
from graftkit.engine.dropout import fast_dropout
from graftkit.engine.forward import Forward
from graftkit.engine.frozen import Phase, set_training
from graftkit.engine.parallel import processes, sum_gradients, sum_numbers
from graftkit.errors import UserError
from graftkit.grafts.graft import Graft
from graftkit.optim.labels import Labels
from graftkit.optim.schedule import factor
from graftkit.tasks.base import Calls, Criterion, Dataset, Task

LOW = 0.01  # share of the learning rate below which a step may be too small to change a number


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know of a recipe. `steps` is the whole number of optimizer steps."""

    steps: int
    batch_size: int
    accumulate: int
    lr: float | None
    weight_decay: float
    warmup: float
    schedule: str
    clip: float
    seed: int


@dataclass(frozen=True)
class Step:
    """One optimizer step: its 1-based number, the mean loss over its units (rows, or labelled tokens), and the
    gradient's norm. `hits`: units answered right; nan where a task cannot say. `unused`: parameters that turned out to
    have no part in the output; `zero`: those whose gradient was zero in the whole first epoch."""

    number: int
    epoch: float
    loss: float
    gradient_norm: float
    lr_factor: float
    rows: int
    units: float
    hits: float
    tokens: int
    unused: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """Share of the units that were answered right in training."""
        return None if math.isnan(self.hits) else self.hits / self.units


class NotFinite(UserError):
    """A loss or gradient was not finite; the weights were not changed."""


class Loop:
    """Iterating trains `graft` on `dataset` from the present step to the last.

    `phases`: what is trained when. What is not yet trained has no gradient, and so no optimizer state and no decay.
    """

    def __init__(self, graft: Graft, dataset: Dataset, forward: Forward, phases: Sequence[Phase],
                 criterion: Criterion, settings: Settings) -> None:  # fmt: skip
        self.graft = graft
        self.dataset = dataset
        self.forward = forward
        self.phases = phases
        self.criterion = criterion
        self.settings = settings
        self.parameters = graft.parameters  # those that are trained now
        self.step = 0
        self.optimizer = graft.optimizer(settings.lr, settings.weight_decay)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.index, self.world = processes()
        self.per_epoch = steps_per_epoch(len(dataset), settings.batch_size, settings.accumulate * self.world)
        self.split = 1  # into how many parts a batch is cut since memory ran out
        self._order: tuple[int, list[np.ndarray]] | None = None

    def __iter__(self) -> Iterator[Step]:
        audit: Audit | None = None
        try:
            for phase in self.phases:
                if self.step >= phase.end:
                    continue
                audit = self._enter(phase, audit)
                modules = self.graft.model.modules()
                lively = next((m for m in modules if m.training and not has_statistics(m)), None)
                while self.step < phase.end:
                    result = self._take_step(phase, audit)
                    if audit is not None and audit.done:
                        audit = None
                    yield result
                    if lively is not None and not lively.training:  # an evaluation came between
                        set_training(self.graft, phase.depth, phase.labels)
            self.graft.model.eval()
        finally:
            for parameter in self.graft.parameters.values():
                parameter.requires_grad_(True)  # as `attach` left it

    def _enter(self, phase: Phase, audit: Audit | None) -> Audit | None:
        """Train what a phase trains, and nothing else; the audit of what is new in it."""
        graft = self.graft
        everything = graft.parameters
        for name, parameter in everything.items():
            parameter.requires_grad_(name in phase.labels)
        self.parameters = {name: p for name, p in everything.items() if name in phase.labels}
        self.forward.enter(phase)
        set_training(graft, phase.depth, phase.labels)
        moving, spare = moving_now(graft, phase.labels), spare_now(graft, phase.labels)
        if audit is not None:
            audit.free(phase.labels, moving, spare)
        elif self.step - phase.start < STEPS:
            before = [earlier.labels for earlier in self.phases if earlier.end <= phase.start]
            audit = Audit(graft.model, phase.labels, moving, before[-1] if before else (), spare)
        return audit

    def batches(self, step: int) -> list[np.ndarray]:
        """The row numbers of each batch of a step (0-based), over all processes."""
        epoch, position = divmod(step, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            settings = self.settings
            self._order = (
                epoch,
                epoch_batches(self.dataset.lengths, settings.batch_size, settings.seed, epoch),
            )
        width = self.settings.accumulate * self.world
        return self._order[1][position * width : (position + 1) * width]

    def _take_step(self, phase: Phase, audit: Audit | None) -> Step:
        settings = self.settings
        scale = factor(self.step, settings.steps, settings.warmup, settings.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * scale
        batches = self.batches(self.step)
        loss, hits, tokens = self._gradients(batches)
        sum_gradients(self.parameters.values())
        if audit is not None:
            audit.after_backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise NotFinite(self._not_finite(loss, norm, batches))
        self.optimizer.step()
        self.step += 1
        if audit is not None:
            falling = (
                phase.start > 0 and scale < LOW
            )  # what is freed at the end may have next to no rate left
            audit.after_step(
                rising=self.step < settings.warmup * settings.steps or falling,
                last=self.step >= min(phase.start + self.per_epoch, settings.steps),
            )
        self.graft.after_step(self.step, settings.steps)
        self.optimizer.zero_grad()
        rows, units = sum(map(len, batches)), self._units(batches)
        epoch = self.step / self.per_epoch
        told = ((), ()) if audit is None else (audit.unused, audit.zero)
        return Step(self.step, epoch, loss, norm, scale, rows, units, hits, tokens, *told)

    def _units(self, batches: list[np.ndarray]) -> float:
        """How many units the loss of a step is the mean over."""
        return max(1.0, sum(float(self.dataset.units[rows].sum()) for rows in batches))

    def _gradients(self, batches: list[np.ndarray]) -> tuple[float, float, int]:
        """Gradients of the mean loss over all units of the step; memory that runs out halves the parts."""
        while True:
            try:
                return self._accumulate(batches)
            except torch.OutOfMemoryError:
                largest = max(map(len, batches))
                if self.split >= largest:
                    raise UserError(
                        "one row alone does not fit into the device's memory; lower data.max_length or choose "
                        "a method that trains fewer blocks."
                    ) from None
            self.split *= 2
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def _accumulate(self, batches: list[np.ndarray]) -> tuple[float, float, int]:
        units = self._units(batches)
        total = torch.zeros((), dtype=torch.float64)
        hits, tokens = 0.0, 0
        device = self.forward.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            seed = self.settings.seed * 1_000_003 + self.step * self.world + self.index
            torch.manual_seed(seed)
            with _numpy_seeded(seed), fast_dropout(device, self.settings.seed, self.step, self.index):
                for whole in batches[self.index :: self.world]:
                    for part in np.array_split(whole, min(self.split, len(whole))):
                        batch = self.dataset.batch(part, device)
                        scores = self.criterion(self.forward(batch), batch)
                        (scores.losses.sum() / units).backward()
                        total += scores.losses.detach().sum().double().cpu()
                        hits += math.nan if scores.hits is None else float(scores.hits.sum())
                        tokens += int(self.dataset.lengths[part].sum())
            extra = (
                self.graft.extra_loss() if self.index == 0 else None
            )  # gradients are summed over processes
            if extra is not None and extra.requires_grad:
                extra.backward()
        loss, hits, read = sum_numbers([float(total) / units, hits, tokens])
        return loss, hits, int(read)

    @torch.no_grad()
    def _not_finite(self, loss: float, norm: float, batches: list[np.ndarray]) -> str:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        rows, guilty = np.concatenate(batches), []
        for part in batches:
            batch = self.dataset.batch(part, self.forward.device)
            losses = self.criterion(self.forward(batch), batch).losses
            guilty += part[~torch.isfinite(losses).cpu().numpy()].tolist()
        named = sorted(guilty or rows.tolist())
        places = "; ".join(self.dataset.where(row) for row in named[:8])
        more = f"; and {len(named) - 8} more" if len(named) > 8 else ""
        which = "rows whose own loss is not finite" if guilty else "rows of the batch"
        return (
            f"{what} in step {self.step + 1}, so the weights were not changed and the run stopped. {which}: "
            f"{places}{more}. Lower the learning rate (train.lr), look at these rows, or use train.precision=fp32."
        )

    def save(self, folder: Path, position: dict[str, Any]) -> None:
        """Write a checkpoint of the present step."""
        checkpoint.save(folder, self.step, self.graft.state, self.optimizer, position)

    def restore(self, folder: Path) -> dict[str, Any] | None:
        """Go on from the newest checkpoint; its position, or None where there is none."""
        position = checkpoint.restore(folder, self.graft.state, self.optimizer)
        if position is not None:
            self.step = position["step"]
        return position


def moving_now(graft: Graft, labels: Labels) -> set[str]:
    """What may move while the parameters of `labels` are trained: these, their running statistics, and what the
    graft's additions remember.
    """
    waiting = {name for name in graft.labels if name not in labels}
    owners = {name.rpartition(".")[0] for name in waiting}
    still = waiting | {name for name in graft.statistics if name.rpartition(".")[0] in owners}
    return set(graft.state) - still


def spare_now(graft: Graft, labels: Labels) -> set[str]:
    """Base parameters of `labels` beside the blocks and the head, of methods that train in the blocks too."""
    backbone = graft.backbone
    sites = {site.name: site for site in backbone.sites}
    owners = {name: sites[name.rpartition(".")[0]] for name in labels if name in backbone.base_parameters}
    wide = {labels[name].method for name, site in owners.items() if site.block is not None}
    return {
        name
        for name, site in owners.items()
        if site.block is None and site.role != "head" and labels[name].method in wide
    }


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Some models draw masks from NumPy's global generator; it goes on afterwards as if nothing had been drawn."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)


@torch.no_grad()
def predict(dataset: Dataset, forward: Calls, task: Task, batch_size: int) -> list[Any]:
    """The task's outcome of every row, in the dataset's order."""
    forward.graft.model.eval()
    result: list[Any] = [None] * len(dataset)
    for rows in ordered_batches(dataset.lengths, batch_size):
        for row, outcome in zip(rows, task.outcomes(forward, dataset.batch(rows, forward.device))):
            result[row] = outcome
    return result
