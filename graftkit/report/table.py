"""Answers as files."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from graftkit.errors import UserError
from graftkit.files import write_text


def check_path(path: Path, source: str | None, overwrite: bool) -> None:
    """Raise `UserError` unless answers to the rows of the file `source` may be written to `path`."""
    if path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        raise UserError(
            f"answers cannot be written as {path.name!r}; use a name that ends in .jsonl, .csv or .tsv."
        )
    given = None if source is None else Path(source).expanduser()
    if given is not None and given.exists() and path.exists() and given.samefile(path):
        raise UserError(f"{path} holds the rows to answer, so it is not overwritten; name another --out.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file with --out.")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; name another --out, or replace it with --overwrite.")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written: {folder} is not a folder that this user may write to.")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV (.csv), TSV (.tsv) or JSON lines (.jsonl), whole or not at all; see `check_path`."""
    kind = path.suffix.lower()
    if kind == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(rows[0]), delimiter="," if kind == ".csv" else "\t", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
