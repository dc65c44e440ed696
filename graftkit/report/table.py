"""Answers as files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from graftkit.errors import UserError
from graftkit.files import write_text


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV (.csv), TSV (.tsv) or JSON lines (.jsonl), whole or not at all."""
    kind = path.suffix.lower()
    if kind == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    if kind not in (".csv", ".tsv"):
        raise UserError(
            f"answers cannot be written as {path.name!r}; use a name that ends in .jsonl, .csv or .tsv."
        )
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(rows[0]), delimiter="," if kind == ".csv" else "\t", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
