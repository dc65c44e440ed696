"""Go on from the state that a run with train.schedule=wsd keeps of the moment before its decay."""

from __future__ import annotations

from pathlib import Path

from graftkit.engine import checkpoint
from graftkit.errors import UserError
from graftkit.optim.schedule import decay_start
from graftkit.recipe import schema as recipes
from graftkit.recipe.expressions import parse_one
from graftkit.recipe.schema import Recipe
from graftkit.runs.folder import BEFORE_DECAY, RECIPE


def state_before_decay(recipe: Recipe) -> Path | None:
    """Return the folder of the state that a run goes on from: that of the run in train.from, if both decay at the end.

    From any other graft, as from a graft folder, a run starts with a fresh optimizer and its own warm-up.
    """
    train = recipe.train
    if train.start is None or train.schedule != "wsd":
        return None
    folder = Path(train.start).expanduser() / BEFORE_DECAY
    return folder if checkpoint.existing(folder) else None


def check_further(recipe: Recipe, steps: int) -> Path | None:
    """Return the folder of the state that a run of `steps` steps in all goes on from; None for an ordinary run.

    Raises `UserError` if the run is too short, or has another optimizer, whose state would be another.
    """
    folder = state_before_decay(recipe)
    if folder is None:
        return None
    run, train = folder.parent, recipe.train
    done = checkpoint.step_of(checkpoint.existing(folder)[-1])
    start = decay_start(steps, train.decay)
    instead = f"or write train.from={run / 'graft'} to start a new optimizer from its final weights"
    if start < done:
        raise UserError(
            f"train.from: the run in {run} goes on from step {done}, before its decay, but of {steps} steps in all the "
            f"decay would begin at step {start}; train longer (train.steps or train.epochs), {instead}."
        )
    before = str(recipes.read(run / RECIPE).get("train", {}).get("optimizer", train.optimizer))
    if str(parse_one(before, "optimizer")) != str(parse_one(train.optimizer, "optimizer")):
        raise UserError(
            f"train.from: the run in {run} goes on from before its decay with the state of {before}, but train.optimizer is "
            f"{train.optimizer}; write the same, {instead}."
        )
    return folder
