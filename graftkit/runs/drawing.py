"""Draw the rows that a run trains on: `data.rows` and `data.per_class`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from graftkit.data.split import draw_per_class, draw_rows
from graftkit.errors import UserError, shown
from graftkit.recipe.schema import Recipe
from graftkit.tasks.base import Examples, Task


def drawn(recipe: Recipe, task: Task, examples: Examples, labels: Sequence[str]) -> Examples:
    """Return the training examples that a recipe draws with its seed, or all of them.

    Fewer rows, or fewer of each class, are always among more that are drawn with the same seed. Raises `UserError` if there
    are not as many, or if the rows have no classes to draw from.
    """
    chosen = places_drawn(recipe, task, examples, labels)
    return examples if chosen is None else examples.take(chosen)


def drawn_by_any(
    recipes: Iterable[Recipe], task: Task, examples: Examples, labels: Sequence[str]
) -> Examples:
    """Return the training examples that any of these recipes draws."""
    chosen = [places_drawn(recipe, task, examples, labels) for recipe in recipes]
    found = [one for one in chosen if one is not None]
    return examples if len(found) < len(chosen) else examples.take(sorted(set().union(*found)))


def places_drawn(recipe: Recipe, task: Task, examples: Examples, labels: Sequence[str]) -> list[int] | None:
    """Return the places of the examples that a recipe draws; None for all. Raises as `drawn`."""
    data = recipe.data
    if data.rows is None and data.per_class is None:
        return None
    key = "data.rows" if data.per_class is None else "data.per_class"
    if task.makes_model:
        raise UserError(f"{key} draws labelled rows, but {task.name}() trains on texts; leave it out.")
    classes = _targets(examples)
    if data.per_class is None:
        assert data.rows is not None
        if data.rows > len(examples):
            raise UserError(
                f"data.rows is {data.rows:,}, but {examples.table.source} has {len(examples):,} rows to train on; lower it."
            )
        return draw_rows(classes or [0] * len(examples), data.rows, recipe.seed)
    if classes is None or not has_classes(examples, labels):
        raise UserError(
            f"data.per_class draws rows of each class, but the rows of {task}() have no single class each; use data.rows."
        )
    counts = np.bincount(classes, minlength=len(labels))
    if (least := int(counts.min())) < data.per_class:
        raise UserError(
            f"class {shown(labels[int(counts.argmin())])} has {least:,} rows to train on in {examples.table.source}, fewer than "
            f"the {data.per_class:,} to draw of each class; ask for at most {least:,}, or add rows of this class."
        )
    return draw_per_class(classes, data.per_class, recipe.seed)


def has_classes(examples: Examples, labels: Sequence[str]) -> bool:
    """Return whether each row has a single class."""
    classes = _targets(examples)
    return classes is not None and all(isinstance(one, int) for one in classes) and bool(labels)


def _targets(examples: Examples) -> list[Any] | None:
    targets: Any = examples.targets
    return targets.tolist() if isinstance(targets, np.ndarray) and targets.ndim == 1 else None
