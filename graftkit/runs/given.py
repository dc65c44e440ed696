"""What is given to a finished run to answer, and the rows that it was trained on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.data.columns import find_again
from graftkit.data.read import SUFFIXES
from graftkit.errors import UserError
from graftkit.recipe.schema import IN_MEMORY
from graftkit.runs.prepare import prepare_rows, reading_of
from graftkit.tasks.base import Examples

if TYPE_CHECKING:
    from graftkit.runs.predict import Opened


def refuse_text(given: str) -> None:
    if not given.strip():
        raise UserError("the name of the data file is empty.")
    if os.path.splitext(given)[1].lower() not in SUFFIXES:
        shown = given if len(given) <= 60 else given[:60] + " ..."
        raise UserError(f"{shown!r} is not a file. To predict for texts, pass a list: [{shown!r}].")


@contextmanager
def settings_of(folder: str | Path) -> Iterator[None]:
    """Add to a message that suggests a setting where to change it: a finished run takes no settings."""
    try:
        yield
    except UserError as error:
        if not re.search(r"\bdata\.(encoding|skip_bad)", str(error)):
            raise
        where = Path(folder) / "recipe.yaml"
        raise UserError(f"{str(error).rstrip('.')} (a setting of this run, in {where}).") from None


def labelled_rows(run: Opened, data: Any, name: str) -> Examples:
    """Read rows with answers for a run: a file, or a table in memory, called `name` in messages."""
    reading, task = reading_of(run.recipe), run.task
    with settings_of(run.folder):
        table = task.read(data, reading, name)
        columns = find_again(table, task.columns, run.columns)
        return task.examples(table, columns, run.labels, reading.skip_bad)


def training_rows(run: Opened) -> Examples:
    """Read the rows that a run was trained on again. Raises `UserError` if they were in memory, or cannot be read."""
    data = run.recipe.data
    if data.train == IN_MEMORY:
        raise UserError("they were in memory when the run was trained.")
    held = None if isinstance(data.eval, str) else data.eval
    alone = data.model_copy(update={"eval": held, "test": None, "probe": None})
    rows = prepare_rows(run.recipe.model_copy(update={"data": alone}))
    if rows.labels != run.labels:
        raise UserError(f"{data.train} has changed: it has other labels now.")
    return rows.train
