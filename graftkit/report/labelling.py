"""Rows as people fill in their labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ANSWERS = ("label", "labels", "value", "tags", "entities")


def to_fill_in(found: Mapping[str, Any], suggests: bool) -> list[dict[str, Any]]:
    """Return the rows of a file to fill in: inputs under their names in the pool, the label, and what is suggested.

    `found`: what `label_next` or `label_suggest` returns; `suggests`: the label is filled in with the suggestion.
    """
    names, rows = found["columns"], []
    for row in found["rows"]:
        answer = next((row[name] for name in ANSWERS if name in row), None)
        told = {} if answer is None else {"suggested": answer}
        told |= {name: row[name] for name in ("probability", "probabilities", "uncertainty") if name in row}
        inputs = {column: row[name] for name, column in names.items() if name in row}
        rows.append({**inputs, found["label"]: answer if suggests else "", **told, "line": row["line"]})
    return rows
