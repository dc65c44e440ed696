"""`train.lr=find`: a range test before the first step of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

from graftkit.engine.forward import Forward
from graftkit.engine.range_test import range_test
from graftkit.engine.range_test import tried as tried_in
from graftkit.report.console import Console
from graftkit.report.curve import show_curve
from graftkit.runs.prepare import Prepared

FIND = "find"


def with_found_lr(prepared: Prepared, console: Console) -> tuple[Prepared, dict[str, Any] | None]:
    """Return a run with the learning rate that a range test finds instead of `find`, and the curve to keep.

    From there on the run is the one with that number. Raises `UserError` if there is nothing to find.
    """
    if prepared.recipe.train.lr != FIND:
        return prepared, None
    settings = prepared.settings
    forward = Forward(prepared.graft, prepared.device, prepared.precision)
    console.line(f"train.lr=find: trying learning rates in {tried_in(settings.steps)} steps")
    curve = range_test(prepared.graft, prepared.train, forward, prepared.phases, prepared.learn, settings)
    found = dataclasses.asdict(curve)
    show_curve(console, found)
    train = prepared.recipe.train.model_copy(update={"lr": curve.chosen})
    prepared = dataclasses.replace(
        prepared,
        recipe=prepared.recipe.model_copy(update={"train": train}),
        settings=dataclasses.replace(settings, lr=curve.chosen),
        plan=dataclasses.replace(prepared.plan, lr=curve.chosen),
    )
    return prepared, found
