"""The backbone of a recipe with an untrained head, for what its features tell of the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftkit.backbone.quantized import move
from graftkit.backbone.source import Source
from graftkit.engine import parallel, precision
from graftkit.engine.forward import Forward
from graftkit.errors import UserError
from graftkit.insight.features import Features, features_of
from graftkit.methods.base import read as read_method
from graftkit.recipe.schema import Recipe
from graftkit.runs.prepare import Rows, attach_new, prepare, prepare_backbone
from graftkit.tasks.base import Dataset, Examples, Task

HEADS = {
    False: "head(pooling='mean')",
    True: "head(pooling='tokens')",
}  # by whether the task predicts for each token


@dataclass(frozen=True)
class Reading:
    """A frozen backbone under a new head: it gives the features of any rows of the task."""

    task: Task
    forward: Forward
    max_length: int

    def dataset(self, examples: Examples) -> Dataset:
        return self.task.dataset(examples, self.forward.graft.backbone, self.max_length)

    def features(self, examples: Examples) -> Features:
        """Return the features of examples, (rows, width), from the cache where earlier runs have kept them."""
        return features_of(self.forward, self.dataset(examples))


def frozen_backbone(recipe: Recipe, rows: Rows, source: Source | None = None) -> Reading:
    """Load the recipe's backbone, whatever its method would train. Raises `UserError` for a task without a head."""
    if not rows.task.head:
        raise UserError(
            f"{rows.task.name}() has no head whose features could be read; this needs a task with classes."
        )
    train = recipe.train.model_copy(update={"start": None, "optimizer": "adamw", "step_in_backward": False})
    run = prepare(
        recipe.model_copy(update={"method": HEADS[rows.task.per_token], "train": train}), rows, source
    )
    return Reading(rows.task, Forward(run.graft, run.device, run.precision), run.max_length)


def bare_backbone(recipe: Recipe, task: Task, source: Source) -> Reading:
    """Load a backbone for features of rows that have no labels yet: its head, which nothing reads, has two outputs."""
    method = read_method(HEADS[task.per_token])
    backbone, method = prepare_backbone(source, method, task, ("one", "other"), seed=recipe.seed)
    graft = attach_new(backbone, method, meta=False)
    device = parallel.device()
    kind = precision.choose(recipe.train.precision, device)
    kind = "bf16" if kind == "fp8" else kind
    precision.cast(graft.model, graft.labels, kind)
    move(graft.model, device)
    config: Any = getattr(graft.model, "config", None)
    if config is not None:
        config.use_cache = False
    return Reading(task, Forward(graft, device, kind), task.max_length(recipe.data.max_length, backbone))
