"""Find a learning rate: train a few steps at an exponentially rising one, and look where the loss falls fastest.

The range test of Smith 2015, 'Cyclical Learning Rates for Training Neural Networks', section 3.3, with an exponential
ramp, a smoothed loss and a stop at four times the lowest loss, as in fastai's `lr_find` (Howard and Gugger 2020,
'fastai: A Layered API for Deep Learning'). Its two classic suggestions are the rate of the steepest descent and a tenth
of the rate of the lowest loss; the smaller of the two is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from graftkit.data.source import Source
from graftkit.engine.audit import STEPS as AUDITED
from graftkit.engine.forward import Forward
from graftkit.engine.frozen import Phase
from graftkit.engine.loop import Loop, NotFinite
from graftkit.engine.settings import Settings
from graftkit.errors import UserError
from graftkit.grafts.graft import Graft
from graftkit.tasks.base import Learn

LOWEST, HIGHEST = 1e-6, 1.0
STEPS = 100
FEWEST = 12  # two in each tenfold of the rate
DIVERGED = 4.0  # times the lowest smoothed loss
BELOW_LOWEST = 10.0  # the lowest loss is reached at a rate that is too high for a whole run
LEAST_FALL = 0.02  # of the loss, below which it is noise
MARGIN = 5  # steps before the running mean is trusted
RECENT = 0.7  # weight of the steps before in the running mean that the stop looks at


@dataclass(frozen=True)
class Curve:
    """A range test: the rate of each step and the loss before it, smoothed too, and the chosen rate."""

    chosen: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    diverged: bool


def tried(steps: int) -> int:
    """Return the steps of the test before a run of `steps` steps: 100, or as many as the run has if it is shorter."""
    return min(STEPS, steps)


def check_searchable(graft: Graft, phases: Sequence[Phase], steps: int, further: Path | None = None) -> None:
    """Raise `UserError` if a range test would say nothing about a run. `further`: the state before its decay of the run that it goes on from."""
    if further is not None:
        raise UserError(
            f"train.lr=find begins with fresh weights, but the run goes on from {further.parent}, before its decay; set train.lr "
            "to the rate of that run."
        )
    if len(phases) > 1:
        raise UserError(
            f"train.lr=find tries rates in the first steps, but {graft.method} trains only some of its parameters in them; "
            "set train.lr to a number."
        )
    if steps < FEWEST:
        raise UserError(
            f"train.lr=find needs a run of at least {FEWEST} steps to try its rates in, but this one has {steps}; set "
            "train.lr to a number, or lower train.batch_size."
        )
    if all(group.fixed_lr for group in graft.labels.values()):
        raise UserError(
            f"train.lr=find has nothing to find: each method of {graft.method} sets its own lr; leave one of the two out."
        )


def range_test(
    graft: Graft, source: Source, forward: Forward, phases: Sequence[Phase], learn: Learn, settings: Settings
) -> Curve:
    """Try the rates from 1e-6 to 1 in the first steps of a run, and return the curve.

    The rates of the run's groups keep their ratios, and rates that a method's options name stay as they are. All tensors
    of the graft are restored bit for bit; randomness is a function of the step, so none is used up. Raises `UserError` if
    the loss does not fall at any rate.
    """
    check_searchable(graft, phases, settings.steps)
    before = {name: tensor.detach().clone() for name, tensor in graft.state.items()}
    rates = np.geomspace(LOWEST, HIGHEST, tried(settings.steps)).tolist()
    try:
        losses, diverged = _losses(graft, source, forward, phases[0], learn, settings, rates)
    finally:
        with torch.no_grad():
            for name, tensor in graft.state.items():
                tensor.copy_(before[name])
    rates, smoothed = rates[: len(losses)], smooth(losses)
    return Curve(choose(rates, smoothed), tuple(rates), tuple(losses), tuple(smoothed), diverged)


def _losses(graft: Graft, source: Source, forward: Forward, phase: Phase, learn: Learn, settings: Settings,
            rates: Sequence[float]) -> tuple[list[float], bool]:  # fmt: skip
    """Return the loss before the step at each rate, up to divergence, and whether it came to that."""
    whole = replace(settings, lr=rates[0], warmup=0.0, schedule="constant", ema=None)
    unaudited = replace(
        phase, start=-AUDITED, end=len(rates)
    )  # the first steps of the run itself are audited
    loop = Loop(graft, source, forward, [unaudited], learn, whole)
    slowest, rising = list(loop.rates), _rising(graft, loop)
    losses: list[float] = []
    mean = weight = 0.0
    lowest = math.inf
    with closing(iter(loop)) as steps:
        try:
            for step in steps:
                losses.append(step.loss)
                mean, weight = RECENT * mean + (1 - RECENT) * step.loss, RECENT * weight + 1 - RECENT
                lowest = min(lowest, mean / weight)
                if len(losses) > MARGIN and mean / weight > DIVERGED * lowest:
                    return losses, True
                factor = rates[min(step.number, len(rates) - 1)] / rates[0]
                loop.rates = [r * factor if up else r for r, up in zip(slowest, rising)]
        except NotFinite:
            return losses, True
    return losses, False


def _rising(graft: Graft, loop: Loop) -> list[bool]:
    """Return for each parameter group of a loop whether train.lr decides its rate."""
    fixed = {id(parameter) for name, parameter in graft.parameters.items() if graft.labels[name].fixed_lr}
    return [not any(id(p) in fixed for p in group["params"]) for group in loop.optimizer.param_groups]


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the mean of each loss and its neighbours, an eighth of all losses wide, so that nothing is delayed."""
    width = max(3, len(losses) // 8) | 1
    window = np.ones(width)
    means = np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")
    return means[: len(losses)].tolist()


def choose(rates: Sequence[float], smoothed: Sequence[float]) -> float:
    """Return the rate of the steepest descent of the loss over log(rate), at most a tenth of that of the lowest loss.

    The descent is looked for from where the last tenth of the plateau ends, since the slope of a plateau is noise. Raises
    `UserError` if the loss does not fall.
    """
    loss = np.asarray(smoothed)
    lowest = int(loss.argmin()) if len(loss) else 0
    plateau = float(np.median(loss[: max(1, lowest // 3)])) if lowest else 0.0
    if lowest < 2 or not loss[lowest] < (1 - LEAST_FALL) * plateau:
        raise UserError(
            f"train.lr=find: the loss did not fall at any rate from {LOWEST:g} to {HIGHEST:g} in {len(loss)} steps; set train.lr "
            "to a number."
        )
    high = np.flatnonzero(loss[:lowest] >= plateau - (plateau - loss[lowest]) / 10)
    start = int(high[-1])
    slopes = np.gradient(loss, np.log(rates))[start : lowest + 1]
    steepest = rates[start + int(slopes.argmin())]
    return float(f"{min(steepest, rates[lowest] / BELOW_LOWEST):.2g}")
