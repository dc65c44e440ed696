"""What is given to a finished run to answer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graftkit.data.read import SUFFIXES
from graftkit.errors import UserError


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
