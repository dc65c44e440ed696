"""What the runs of a study have in common: their number of steps, and the rows that they are measured on."""

from __future__ import annotations

import math
from typing import Any

from graftkit.data.order import steps_per_epoch
from graftkit.engine.parallel import processes
from graftkit.errors import UserError
from graftkit.recipe.schema import NEW, Recipe
from graftkit.runs.prepare import Rows


def refuse_unfit(recipe: Recipe, kind: str) -> None:
    """Raise `UserError` for a recipe whose runs cannot be compared: without held-out rows, or of pre-training."""
    if recipe.data.eval is None:
        raise UserError(
            f"graftkit {kind} keeps the best weights of each run by held-out rows: set data.eval to a file or a share."
        )
    if recipe.model == NEW or recipe.budget is not None:
        raise UserError(
            f"graftkit {kind} is for adapting an existing model: name one with --model, and no size or budget."
        )
    if recipe.data.rows is not None or recipe.data.per_class is not None:
        raise UserError(f"graftkit {kind} draws the rows itself: leave data.rows and data.per_class out.")
    if processes()[1] > 1:
        raise UserError(
            f"graftkit {kind} runs in one process; start it without torchrun or accelerate launch."
        )


def sized(recipe: Recipe, rows: int) -> Recipe:
    """Return a recipe with the steps of its epochs over so many rows, and evaluations as often, whatever it trains on."""
    train = recipe.train
    per_epoch = steps_per_epoch(rows, train.batch_size, train.accumulate)
    update: dict[str, Any] = {"steps": train.steps or math.ceil(train.epochs * per_epoch)}
    every = train.evaluate_every
    if isinstance(every, str) and every != "end":
        update["evaluate_every"] = per_epoch * (1 if every == "epoch" else int(every.split()[0]))
    return recipe.model_copy(update={"train": train.model_copy(update=update)})


def measured_on(recipe: Recipe, rows: Rows) -> dict[str, Any]:
    """Return which rows the metrics are of, how many, and what has to be known of them."""
    if rows.test is not None:
        return {"split": "test", "measured_rows": len(rows.test), "notes": []}
    assert rows.eval is not None
    note = (
        f"There are no test rows: the same {len(rows.eval):,} evaluation rows chose the learning rates and the weights, so all "
        "figures are somewhat too good. Name test rows with --test."
    )
    return {"split": "evaluation", "measured_rows": len(rows.eval), "notes": [note]}
