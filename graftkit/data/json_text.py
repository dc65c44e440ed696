"""JSON of rows: no key twice, and not nested so deeply that it cannot be copied or shown."""

from __future__ import annotations

import json
from typing import Any

DEPTH = 100


def parse_json(text: str, *, halves: bool = False) -> Any:
    """Return the value of a JSON text. Raises `ValueError`; a `json.JSONDecodeError` if it is not JSON.

    `halves`: halves of surrogate pairs, which are no characters, may stay, as they are cleaned later.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEPTH} deep") from None
    if not halves and ("\\ud" in text or "\\uD" in text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"it has half of a surrogate pair (\\u{ord(error.object[error.start]):04x})"
            ) from None
    if text.count("[") + text.count("{") > DEPTH:
        _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"the key {twice[:100]!r} is given twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if any(isinstance(inner, dict | list) for inner in level):
        raise ValueError(f"it is nested more than {DEPTH} deep")
