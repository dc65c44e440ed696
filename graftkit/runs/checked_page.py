"""Write what `data check` found as a page, with the pictures and sounds of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from graftkit.errors import UserError
from graftkit.files import write_text
from graftkit.report.checked_page import check_page
from graftkit.report.values import Check
from graftkit.tasks.base import Examples, Task

SHOWN = 40  # rows of each kind with a picture or a sound; there may be thousands


def write_check_page(
    path: Path, found: Check, task: Task, model: str | None, parts: Mapping[str, Examples]
) -> None:
    """Write the page. A row whose picture or sound can no longer be read has none."""
    kinds = (found.suspects or [], found.leaks, found.duplicates, found.outliers or [])
    wanted = {(one["data"], one["row"]) for rows in kinds for one in rows[:SHOWN]}
    previews = {}
    for name, row in sorted(wanted):
        try:
            previews[name, row] = task.preview(parts[name], row)
        except (UserError, OSError):
            continue
    write_text(path, check_page(found, str(task), model, previews))
