"""What a run will take, from passes of a trial on its own model and rows (`engine.trial`)."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from graftkit.plan.forecast import Forecast, Passes
from graftkit.plan.history import TRIAL, History
from graftkit.plan.parameters import Plan

# Shapes whose kernels are kept: oneDNN's cache has room for 1,024 kernels, and a step of a transformer with LoRA has about 30 of its own.
# Memory is held for more: that of kernels that were dropped is not free for others.
CAPACITY, HELD = 35, 50
WITHOUT_GRADIENTS = 1 / 3  # of the kernels of a step, where they were not measured
# On a CPU, times as much as the heaviest step, and the heaviest batch that fills a cache, take by themselves, that they take within a run:
# malloc keeps freed blocks between those that live, up to what `engine.heap` allows. Fitted to 20 runs of texts, images and
# sounds on glibc (docs/log.md).
FRAGMENTED, FILLING = 1.18, 1.25
# What the first evaluation loads to compute metrics: scikit-learn, with SciPy and pandas.
METRICS_BYTES, METRICS_SECONDS = 105e6, 1.0
AROUND = 0.0006  # seconds of a step for what the loop does around it on a host: figures, log lines, progress
EVALUATED = 0.1  # seconds of metrics, and of files of any size


@dataclass(frozen=True)
class Batches:
    """The batches of one kind of pass, in the order of the run: `sizes` (batches,), in proportion to their arithmetic, and
    `shapes` (batches,): those of one shape share kernels. They stand for `times` as many."""

    sizes: np.ndarray
    shapes: np.ndarray
    times: float = 1.0

    def new(self, capacity: int) -> np.ndarray:
        """Return for each batch whether its kernels are compiled anew, if those of `capacity` shapes are kept."""
        kept: OrderedDict[int, None] = OrderedDict()
        found = np.zeros(len(self.shapes), bool)
        for place, shape in enumerate(self.shapes.tolist()):
            found[place] = shape not in kept
            kept[shape] = None
            kept.move_to_end(shape)
            if len(kept) > capacity:
                kept.popitem(last=False)
        return found


@dataclass(frozen=True)
class Kind:
    """Passes of one kind. `warm`, `cold`: (size, seconds) of those whose shape was met before, and of those whose was not;
    `peak`: bytes over what was held before, without `kept`: bytes that stay for each new shape."""

    warm: list[tuple[float, float]]
    cold: list[tuple[float, float]]
    peak: int
    kept: int

    def seconds(self, batches: Batches, capacity: int = CAPACITY) -> float:
        """Return the seconds of all these batches."""
        if not len(batches.sizes):
            return 0.0
        total = float(interpolated(self.warm or self.cold, batches.sizes).sum())
        if self.warm and self.cold:
            over = [
                seconds - float(interpolated(self.warm, np.array([size]))[0]) for size, seconds in self.cold
            ]
            total += max(0.0, float(np.median(over))) * float(batches.new(capacity).sum())
        return total * batches.times


def interpolated(points: Sequence[tuple[float, float]], sizes: np.ndarray) -> np.ndarray:
    """Return the seconds of batches of these sizes: between measured ones on a line, outside of them in proportion to the
    nearest. Sizes that were measured several times count with their mean."""
    known: dict[float, list[float]] = {}
    for size, seconds in points:
        known.setdefault(size, []).append(seconds)
    x = np.array(sorted(known))
    y = np.array([float(np.mean(known[size])) for size in x])
    inside = np.interp(sizes, x, y)
    return inside * np.where(sizes < x[0], sizes / x[0], np.where(sizes > x[-1], sizes / x[-1], 1.0))


@dataclass(frozen=True)
class Measured:
    """A trial. `loading`, `loaded`: seconds and bytes of libraries, which the first pass loads; `update`: seconds of a step of
    the optimizer; `prepare`: of making a batch; `writing`: of a byte of a checkpoint; `saved`: bytes of activations of the
    heaviest batch; `time`, `flops`, `moved`: seconds, FLOPs of each kind and bytes of a batch of
    `typical` size; `forward`: the share of the forward pass; `cached_bytes`: of the cache of frozen layers in memory."""

    step: Kind
    evaluation: Kind | None
    filling: Kind | None
    loading: float
    loaded: int
    update: float
    prepare: float
    writing: float
    saved: int
    typical: float
    forward: float
    cached_bytes: int
    time: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(values: dict[str, Any]) -> Measured:
        """Return what `as_dict` returned, from JSON."""
        kinds = {name: _kind(values[name]) for name in ("step", "evaluation", "filling")}
        return Measured(**{**values, **kinds})


def _kind(values: dict[str, Any] | None) -> Kind | None:
    if values is None:
        return None
    warm, cold = ([(size, seconds) for size, seconds in values[key]] for key in ("warm", "cold"))
    return Kind(warm, cold, values["peak"], values["kept"])


def measured_forecast(
    plan: Plan, trial: Measured, passes: Passes, steps: Batches, evaluations: Batches, fillings: Batches,
    history: History, *, fresh: bool, waits: bool, metrics: bool,
) -> Forecast:  # fmt: skip
    """Return what a run takes. `steps`: the batches of its steps; `evaluations`: of one evaluation; `fillings`: of the cache.
    `fresh`: the trial was made by this process, which has loaded the libraries; `waits`: host and device are one; `metrics`: the run loads what computes metrics."""
    batches = passes.steps * passes.accumulate
    around = trial.update / passes.accumulate + AROUND + (0.5 if waits else 0.0) * trial.prepare
    spent = trial.step.seconds(steps, CAPACITY) + batches * around
    filling = 0.0 if trial.filling is None else trial.filling.seconds(fillings)
    evaluation = 0.0
    if passes.evaluations:
        if trial.evaluation is not None:
            evaluation = trial.evaluation.seconds(evaluations)
        else:
            evaluation = trial.forward * trial.step.seconds(evaluations)
        evaluation += EVALUATED + trial.writing * _written(plan)
    total = filling + spent + passes.evaluations * evaluation + (0.0 if fresh else trial.loading)
    total += METRICS_SECONDS if metrics else 0.0
    step = spent / max(1, passes.steps)
    seconds = {
        "step": step, "epoch": step * passes.per_epoch, "evaluation": evaluation, "filling": filling, "total": total,
    }  # fmt: skip
    whole = sum(trial.time.values()) or 1.0
    return Forecast(
        memory_of(
            plan,
            trial,
            steps,
            evaluations,
            fillings,
            history,
            waits,
            passes.accumulate,
            METRICS_BYTES if metrics and waits else 0,
        ),
        {k: round(v, 4) for k, v in seconds.items()}
        | {"interval": [round(x, 3) for x in history.interval("seconds", total)]},
        _flops(trial, passes, steps),
        {kind: round(taken / whole, 3) for kind, taken in trial.time.items() if taken},
        history.errors(),
        by=TRIAL,
    )


def _written(plan: Plan) -> float:
    """Return the bytes that an evaluation writes: the best weights and a checkpoint."""
    return 2.0 * 4 * plan.trained_parameters + plan.optimizer_bytes + plan.ema_bytes


def memory_of(
    plan: Plan, trial: Measured, steps: Batches, evaluations: Batches, fillings: Batches, history: History, cpu: bool,
    accumulate: int, metrics: float,
) -> dict[str, Any]:  # fmt: skip
    """Return the bytes of each part at the peak. `cpu`: of a process, whose malloc keeps freed blocks, not of a GPU."""
    used: dict[str, int] = {}
    for name, kind, batches in (
        ("step", trial.step, steps),
        ("evaluation", trial.evaluation, evaluations),
        ("filling", trial.filling, fillings),
    ):
        kept = int(trial.step.kept * WITHOUT_GRADIENTS) if kind is None else kind.kept
        used[name] = kept * min(len(set(batches.shapes.tolist())), HELD)
    known = [kind for kind in (trial.step, trial.evaluation, trial.filling) if kind is not None]
    kernels = min(sum(used.values()), HELD * max(kind.kept for kind in known))
    held = plan.optimizer_bytes + plan.ema_bytes
    between = plan.gradient_bytes if accumulate > 1 else 0  # gradients that wait for those of other batches
    fill = 0 if trial.filling is None else trial.filling.peak
    step = max(kind.peak for kind in known if kind is not trial.filling)
    filling = (FILLING if cpu else 1.0) * fill + min(used["filling"], kernels)
    training = (FRAGMENTED if cpu else 1.0) * step + metrics + held + between + kernels
    over = int(trial.loaded + trial.cached_bytes + max(filling, training))
    gradients = min(plan.gradient_bytes, max(0, over - held))
    activations = max(0, min(trial.saved, over - held - gradients))
    low, high = history.interval("peak_memory_bytes", over)
    return {
        "weights": plan.weight_bytes, "gradients": gradients, "optimizer": held, "activations": activations,
        "other": over - held - gradients - activations, "peak": plan.weight_bytes + over,
        "interval": [int(plan.weight_bytes + low), int(plan.weight_bytes + high)],
    }  # fmt: skip


def _flops(trial: Measured, passes: Passes, steps: Batches) -> dict[str, Any]:
    mean = float(steps.sizes.mean()) / trial.typical if len(steps.sizes) and trial.typical else 1.0
    share = Counter({kind: count * mean * passes.accumulate for kind, count in trial.flops.items()})
    step = sum(share.values())
    return {
        "step": step, "total": step * passes.steps, **share, "elementwise_bytes": trial.moved * mean * passes.accumulate,
    }  # fmt: skip


def shape_of(rows: int, length: int) -> int:
    """Return the number of the shape of a batch: products see its tokens only."""
    return rows * length


def batch_sizes(linear: float, quadratic: float, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the sizes of batches (batches,) of `rows` rows of `lengths`: FLOPs of `linear` a token and `quadratic` for each
    pair of tokens of a row; tokens, if both are 0."""
    if not linear + quadratic or not math.isfinite(linear + quadratic):
        linear = 1.0
    return rows * (linear * lengths + quadratic * lengths.astype(float) ** 2)
