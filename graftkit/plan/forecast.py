"""What a run will take on a device: memory, time and where it goes, from counted passes and rates."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

from graftkit.plan.history import COUNT, History
from graftkit.plan.operations import ELEMENTWISE, KINDS, Operation
from graftkit.plan.parameters import Plan
from graftkit.plan.pretended import Counted

# What the process takes on a CPU beside live tensors, measured over runs of MiniLM from 8 to 96 rows: pages of libraries that
# the first step touches, and the room that malloc leaves between blocks of other sizes and keeps.
CPU_CONTEXT = 40e6
CPU_FRAGMENTED = 1.26
CPU_LEAST = 41e6  # of the evaluation and its metrics; they use what larger steps have left
GPU_CONTEXT = 9e6  # of cuBLAS, as torch's allocator counts it; the context of the driver is outside of that
GPU_FRAGMENTED = 1.02
HOST = "host"
# Seconds that no operation shows, on a CPU: the first steps load libraries and are audited; an evaluation computes metrics and
# writes a checkpoint.
BEGINNING, EVALUATED = 0.8, 0.1


class Clock(Protocol):
    """Seconds of operations: measured here (`plan.rates`), or by a data sheet (`plan.elsewhere`)."""

    call: float
    waits: bool  # the host and the device work one after the other

    def seconds(self, operation: Operation) -> float: ...


@dataclass(frozen=True)
class Passes:
    """How often a run does what. `steps`, `per_epoch`; `accumulate`: batches of a step; `evaluations`: in all steps;
    `evaluation_batches`, `fill_batches`: batches of one evaluation, and of filling the cache of frozen layers."""

    steps: int
    per_epoch: int
    accumulate: int = 1
    evaluations: int = 0
    evaluation_batches: float = 0
    fill_batches: float = 0


@dataclass(frozen=True)
class Load:
    """The passes of a run. `heavy`: the step of the longest rows; `usual`: those of one or more typical batches, each with its
    share of all; `evaluation`, `filling`: one batch; `prepare`: seconds to make a batch from its rows; `cached_bytes`: of cached
    outputs of frozen layers."""

    heavy: Counted
    usual: list[tuple[float, Counted]]
    evaluation: Counted | None
    filling: Counted | None
    prepare: float = 0.0
    cached_bytes: int = 0
    exact: bool = True
    note: str | None = None


@dataclass(frozen=True)
class Forecast:
    """`memory`, `seconds`, `flops`: as in `graftkit plan --json`; `time`: the share of each kind of work in a step."""

    memory: dict[str, Any]
    seconds: dict[str, Any]
    flops: dict[str, Any]
    time: dict[str, float]
    plan_error: dict[str, Any] | None = None
    note: str | None = None
    advice: list[str] = field(default_factory=list)
    by: str = COUNT  # how it was made

    @property
    def predicted(self) -> dict[str, Any]:
        """What result.json compares: the peak over the resident model, and the seconds of the run."""
        return {
            "peak_memory_bytes": int(self.memory["peak"] - self.memory["weights"]),
            "seconds": round(self.seconds["total"], 3),
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "memory_bytes": self.memory, "flops": self.flops, "seconds": self.seconds, "time": self.time,
            "plan_error": self.plan_error, "forecast_note": self.note, "advice": self.advice,
        }  # fmt: skip


def forecast(
    plan: Plan, load: Load, passes: Passes, clock: Clock, history: History, *, cpu: bool
) -> Forecast:
    """Return what a run takes. `cpu`: of the memory of a process, not of a GPU."""
    memory = memory_of(plan, load, passes, history, cpu)
    spent: Counter[str] = Counter()
    for share, counted in load.usual:
        for kind, taken in _spent(counted, clock).items():
            spent[kind] += share * taken  # type: ignore[assignment]
    one = _total(spent, clock)
    if clock.waits:
        one += 0.5 * load.prepare  # made ahead, in a thread that takes a core of those that compute
    else:
        one = max(one, load.prepare)
    update = _update(plan, clock)
    step = (passes.accumulate * one + update) if passes.steps else 0.0
    spent[ELEMENTWISE] += update / max(1, passes.accumulate)  # type: ignore[assignment]
    evaluation = _batch(load.evaluation, clock) * passes.evaluation_batches
    filling = _batch(load.filling, clock) * passes.fill_batches
    per_epoch = passes.per_epoch * step
    evaluation += EVALUATED if passes.evaluations else 0.0
    total = BEGINNING + filling + passes.steps * step + passes.evaluations * evaluation
    flops = _flops(load, passes)
    seconds: dict[str, Any] = {
        "step": step, "epoch": per_epoch, "evaluation": evaluation, "filling": filling, "total": total,
        "interval": [round(x, 3) for x in history.interval("seconds", total)],
    }  # fmt: skip
    whole = sum(spent.values()) or 1.0
    return Forecast(
        memory,
        {name: value if isinstance(value, list) else round(value, 4) for name, value in seconds.items()},
        flops,
        {kind: round(spent[kind] / whole, 3) for kind in (*KINDS, HOST) if spent[kind]},
        history.errors(),
        load.note,
    )


def memory_of(plan: Plan, load: Load, passes: Passes, history: History, cpu: bool) -> dict[str, Any]:
    """Return the bytes of each part at the peak. Parts that malloc keeps for later are shared by all passes."""
    others = [one for one in (load.evaluation, load.filling) if one is not None]
    gradients = min(plan.gradient_bytes, load.heavy.peak) if passes.accumulate == 1 else 0
    if cpu:
        small = max([load.heavy.small, *(one.small for one in others)])
        large = max([load.heavy.large, *(one.large for one in others)])
        over = min(small + large, 1.1 * max([load.heavy.peak, *(one.peak for one in others)]))
        live = CPU_CONTEXT + max(CPU_FRAGMENTED * over, CPU_LEAST)
    else:
        live = GPU_CONTEXT + GPU_FRAGMENTED * max([load.heavy.peak, *(one.peak for one in others)])
    held = plan.optimizer_bytes + plan.ema_bytes + (plan.gradient_bytes if passes.accumulate > 1 else 0)
    held += load.cached_bytes if cpu else 0
    over = int(live + held)
    activations = load.heavy.saved
    known = plan.gradient_bytes if passes.accumulate > 1 else gradients
    other = over - known - plan.optimizer_bytes - plan.ema_bytes
    activations = max(0, min(activations, other))
    low, high = history.interval("peak_memory_bytes", over)
    return {
        "weights": plan.weight_bytes, "gradients": known, "optimizer": plan.optimizer_bytes + plan.ema_bytes,
        "activations": activations, "other": other - activations, "peak": plan.weight_bytes + over,
        "interval": [int(plan.weight_bytes + low), int(plan.weight_bytes + high)],
    }  # fmt: skip


def _spent(counted: Counted, clock: Clock) -> dict[str, float]:
    spent = dict.fromkeys((*KINDS, HOST), 0.0)
    for operation, times in counted.operations.items():
        if operation.kind in spent:
            spent[operation.kind] += times * clock.seconds(operation)
    spent[HOST] = counted.calls * clock.call
    return spent


def _total(spent: dict[str, float] | Counter[str], clock: Clock) -> float:
    """The host of a GPU works ahead of it, so the slower of the two sets the pace."""
    device = sum(seconds for kind, seconds in spent.items() if kind != HOST)
    return device + spent[HOST] if clock.waits else max(device, spent[HOST])


def _batch(counted: Counted | None, clock: Clock) -> float:
    return 0.0 if counted is None else _total(_spent(counted, clock), clock)


def _update(plan: Plan, clock: Clock) -> float:
    """Clipping reads the gradients twice and writes them once; the step reads and writes weights and states."""
    import torch

    trained = plan.trained_parameters - plan.never_trained_parameters
    moved = 4.0 * 3 * trained + 4.0 * 3 * trained + 2.0 * plan.optimizer_bytes
    return (
        clock.seconds(Operation(ELEMENTWISE, "add", torch.float32, (trained,), 0.0, moved))
        if trained
        else 0.0
    )


def _flops(load: Load, passes: Passes) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    moved = 0.0
    for share, counted in load.usual:
        for operation, times in counted.operations.items():
            kinds[operation.kind] += share * times * operation.flops * passes.accumulate  # type: ignore[assignment]
            moved += (
                share * times * operation.bytes * passes.accumulate if operation.kind == ELEMENTWISE else 0.0
            )
    step = float(sum(kinds.values()))
    others = sum(
        0.0 if one is None else one.flops * times
        for one, times in (
            (load.evaluation, passes.evaluations * passes.evaluation_batches), (load.filling, passes.fill_batches),
        )
    )  # fmt: skip
    return {
        "step": step, "total": step * passes.steps + others,
        **{kind: float(kinds[kind]) for kind in KINDS if kind != ELEMENTWISE}, "elementwise_bytes": moved,
    }  # fmt: skip
