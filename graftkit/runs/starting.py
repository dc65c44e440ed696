"""The new model that a recipe with a size starts from: its tokenizer, and random weights in RUN/initial."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftkit.backbone.geometries import Geometry, geometry_of, write_new
from graftkit.backbone.source import class_of
from graftkit.claims import is_leftover, remove, remove_leftovers, temporary
from graftkit.data.vocabularies import SPECIAL
from graftkit.engine.parallel import in_first, wait
from graftkit.errors import UserError
from graftkit.recipe.schema import NEW, Recipe
from graftkit.runs.folder import INITIAL
from graftkit.runs.prepare import Rows
from graftkit.runs.tokenizer import load_tokenizer, train_tokenizer
from graftkit.tasks.base import Task
from graftkit.tasks.objectives.base import Objective
from graftkit.tasks.objectives.documents import Documents

DEFAULT_SIZE, DEFAULT_FAMILY = "mini", "bert"


@contextmanager
def started(recipe: Recipe, rows: Rows, folder: Path) -> Iterator[Recipe]:
    """Yield the recipe with a model to load. If it names a size, one is written to `folder` under a temporary name, which
    is removed on exit unless `put_in_place` was called."""
    if recipe.model != NEW:
        yield recipe
        return
    part = temporary(folder / INITIAL)

    def write() -> None:
        remove_leftovers(folder)  # of a killed run, so that there is one model to find
        write_start(recipe, rows, part)

    try:
        in_first(write)
        wait()
        found = next(iter(sorted(folder.glob(f"{INITIAL}.*.part"))))
        try:
            yield with_start(recipe, rows.task, str(found))
        except UserError as error:
            if str(found) not in str(error):
                raise
            raise UserError(str(error).replace(str(found), "the new model")) from None
    finally:
        remove(part)


def write_start(recipe: Recipe, rows: Rows, folder: Path) -> None:
    """Write the tokenizer and the random model of a recipe to a folder."""
    task, geometry = rows.task, size_of(recipe, rows.task)
    tokenizer = tokenizer_for(recipe, rows, geometry, folder)
    write_new(geometry, lambda kind: class_of(kind, task.families), tokenizer, folder, recipe.seed)


def with_start(recipe: Recipe, task: Task, model: str) -> Recipe:
    """Return a recipe that starts from a model instead of a size; the size decides the default learning rate."""
    whole = recipe.train.lr is None and recipe.method is not None and not recipe.method.count("lr=")
    lr = size_of(recipe, task).lr if whole else recipe.train.lr
    none = {"size": None, "tokenizer": None, "vocabulary": None}
    return recipe.model_copy(
        update={"model": model, "train": recipe.train.model_copy(update={"lr": lr}), **none}
    )


def part_of(recipe: Recipe, folder: Path) -> Path | None:
    """Return where the new model of a run stands until the run begins; None if it has none."""
    path = Path(recipe.model)
    return path if path.parent == folder and is_leftover(path) else None


def put_in_place(recipe: Recipe, folder: Path) -> Recipe:
    """Move the new model of a run, if it has one, to its final name; return the recipe with that."""
    part = part_of(recipe, folder)
    if part is None:
        return recipe
    wait()  # until all processes have read it
    in_first(lambda: os.replace(part, folder / INITIAL))
    wait()
    return recipe.model_copy(update={"model": str(folder / INITIAL)})


def size_of(recipe: Recipe, task: Task) -> Geometry:
    """Return the geometry that a recipe names, by default the family's mini."""
    family = task.geometry if isinstance(task, Objective) else DEFAULT_FAMILY
    return geometry_of(recipe.size or DEFAULT_SIZE, family)


def tokenizer_for(recipe: Recipe, rows: Rows, geometry: Geometry, folder: Path) -> Any:
    """Return the tokenizer that a recipe names, or a new one that is trained on its texts in `folder`."""
    task, train = rows.task, rows.train
    if recipe.tokenizer is not None:
        tokens = task.special_tokens if isinstance(task, Objective) else ()
        return with_tokens(load_tokenizer(recipe.tokenizer), tokens)
    if not isinstance(train, Documents) or not isinstance(task, Objective):
        raise UserError(
            f"a new model for {task.name}() needs a tokenizer; name a folder that holds one: tokenizer=FOLDER."
        )
    special = next(name for name, tokens in SPECIAL.items() if set(task.special_tokens) <= set(tokens))
    train_tokenizer(
        list(train.paths), kind=task.vocabulary, vocab=recipe.vocabulary or geometry.vocabulary, out=folder,
        special=special, column=train.column, documents=train.documents, encoding=recipe.data.encoding,
    )  # fmt: skip
    return load_tokenizer(str(folder))


def with_tokens(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """Add the special tokens that an objective needs and a tokenizer lacks. The model is new, so it has room for them."""
    known, more = tokenizer.get_vocab(), {}
    for name, token in (("mask_token", "[MASK]"), ("eos_token", "</s>")):
        if getattr(tokenizer, name) is None and token in tokens:
            more[name] = token
    lacking = [token for token in tokens if token not in known and token not in more.values()]
    tokenizer.add_special_tokens(
        {**more, "extra_special_tokens": lacking}, replace_extra_special_tokens=False
    )
    return tokenizer
