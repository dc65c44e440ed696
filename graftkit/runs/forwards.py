"""The forward passes of a run: from its inputs, or from cached values of its frozen layers."""

from __future__ import annotations

import math

from graftkit.engine.cached import Caching, PhasedForward, make_forward
from graftkit.engine.forward import Forward
from graftkit.runs.prepare import Prepared
from graftkit.tasks.base import Dataset


def training_forward(prepared: Prepared, dataset: Dataset, written: bool = False) -> Forward:
    """Return the forward pass of the training rows. `written`: files of cached values are written however little work they save."""
    per_epoch = prepared.plan.steps_per_epoch
    where = prepared.graft, prepared.device, prepared.precision
    caching = Caching(prepared.recipe.train.cache, prepared.settings.seed, written=written)
    if len(prepared.phases) > 1:
        return PhasedForward(*where, dataset, per_epoch, caching)
    passes = math.ceil(prepared.settings.steps / per_epoch)
    return make_forward(*where, prepared.depth, dataset, passes, prepared.phases[0].labels, caching)


def evaluation_forward(prepared: Prepared, dataset: Dataset, passes: int, written: bool = False) -> Forward:
    """Return the forward pass of evaluation or test rows, which are read `passes` times."""
    caching = Caching(prepared.recipe.train.cache, prepared.settings.seed, later=True, written=written)
    where = prepared.graft, prepared.device, prepared.precision, prepared.depth
    return make_forward(*where, dataset, passes, prepared.phases[-1].labels, caching)
