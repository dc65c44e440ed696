"""Measure what a run of each method of a study takes, and decide how many runs train at a time.

A run has a part that its number of steps does not change, and its steps. Steps that do not fill the machine, as those of a
head on cached activations, are as fast with one thread, and several runs then share the machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graftkit.engine.loop import Loop
from graftkit.engine.memory import peak_memory, reset_peak_memory, resident
from graftkit.recipe.schema import Recipe
from graftkit.runs.foresight import encoded
from graftkit.runs.forwards import evaluation_forward, training_forward
from graftkit.runs.prepare import Rows, prepare

WARM_UP, TIMED = 3, 6  # steps; the gradient audit is in the first two
GAIN = 0.9  # of the time of one run after the other, at most, which runs side by side take


@dataclass(frozen=True)
class Pace:
    """How many runs train at a time, and with how many threads each."""

    at_once: int
    threads: int


@dataclass(frozen=True)
class Cost:
    """What a run takes. `fixed`: seconds besides its steps; `alone`, `beside`: seconds of all steps with all threads, and with
    its share of them; `memory`: bytes."""

    fixed: float
    alone: float
    beside: float
    memory: int

    def seconds(self, beside: bool) -> float:
        return self.fixed + (self.beside if beside else self.alone)


def measure(recipe: Recipe, rows: Rows, threads: int, share: int) -> dict[str, Any]:
    """Return the `Cost` of a run as plain values, and leave the activations of its frozen layers in files for all runs.

    `threads`: of this process; `share`: of a run beside others.
    """
    begun, held = time.monotonic(), resident()
    reset_peak_memory(torch.device("cpu"))
    prepared, datasets = encoded(prepare(recipe, rows))
    fixed = time.monotonic() - begun
    forward = training_forward(prepared, datasets["train"], written=True)
    for name in datasets.keys() - {"train"}:
        evaluation_forward(prepared, datasets[name], 2, written=True)
    if not prepared.settings.steps:
        return asdict(Cost(fixed, 0.0, 0.0, max(0, peak_memory(prepared.device) - held)))
    where = prepared.graft, datasets["train"], forward, prepared.phases, prepared.learn
    loop = Loop(*where, prepared.settings)
    alone = beside = 0.0
    with closing(iter(loop)) as steps:
        for _ in range(min(WARM_UP, max(0, prepared.settings.steps - 2 * TIMED))):
            next(steps)
        seconds: dict[int, list[float]] = {threads: [], share: []}
        for number in range(min(2 * TIMED, prepared.settings.steps - loop.step)):
            count = (share, threads)[number % 2]
            torch.set_num_threads(count)
            start = time.perf_counter()
            next(steps)
            seconds[count].append(time.perf_counter() - start)
    alone, beside = (prepared.settings.steps * _mean(seconds[count]) for count in (threads, share))
    return asdict(Cost(fixed, alone, beside, max(0, peak_memory(prepared.device) - held)))


def _mean(seconds: Sequence[float]) -> float:
    """Return the mean without the slowest, in which something else may have run."""
    kept = sorted(seconds)[: max(1, len(seconds) - 1)]
    return sum(kept) / max(1, len(kept))


def pace_of(costs: Sequence[tuple[Cost, int, int]], threads: int, at_once: int, room: float) -> Pace:
    """Return how runs are made. `costs`: of each chain of runs, with their number and
    how many of them wait for another; `at_once`: the most that there ever are to do; `room`: bytes for all."""
    most = max((cost.memory for cost, _, _ in costs), default=0)
    at_once = min(at_once, threads, int(room // most) if most else threads)
    if at_once < 2:
        return Pace(1, threads)
    alone = sum(runs * cost.seconds(False) for cost, runs, _ in costs)
    beside = max(
        sum(runs * cost.seconds(True) for cost, runs, _ in costs) / at_once,
        max((waits * cost.seconds(True) for cost, _, waits in costs), default=0.0),
    )
    if beside > GAIN * alone:
        return Pace(1, threads)
    return Pace(at_once, max(1, threads // at_once))
