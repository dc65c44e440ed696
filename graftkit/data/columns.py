"""Find the columns of a table that a task needs: as named in the recipe, then by name, then by type."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.data.read import Table
from graftkit.errors import UserError, listing, nearest

SENTENCE = 5  # a column name of at least this many words may be a text


@dataclass(frozen=True)
class Column:
    """A column that a task uses. `aliases`: other common names for it, best first. `kind`: 'text' or 'label'. A column that
    is not `required` is found only by name."""

    name: str
    aliases: tuple[str, ...]
    kind: str
    required: bool = True


@dataclass(frozen=True)
class _Profile:
    """What the values of a column look like, ignoring empty ones."""

    kind: str  # 'whole' (integers, booleans, digits), 'string' or 'other'
    distinct: int
    filled: int
    mean_length: float


def find_columns(table: Table, wanted: Sequence[Column], named: Mapping[str, str]) -> dict[str, str]:
    """Return the table's column for each wanted one: `{'text': 'utterance', 'label': 'intent'}`.

    `named` is the recipe's `data.columns`. Other columns are found by name or alias, ignoring case, and then, if required,
    by type: a label has few distinct values, and a text is the longest string. Optional columns that are not found are
    omitted. They are not searched for if `named` contains another column of the same kind: a recipe that names the text
    wants no pair.

    Raises `UserError` if `named` does not fit the task or the table, if a required column is not found, or if several
    columns match.
    """
    found = _check_named(table, wanted, named)
    kinds = {column.kind for column in wanted if column.name in named}
    sought = [
        column for column in wanted if column.required or column.name in named or column.kind not in kinds
    ]
    return _find(table, sought, found, _how_to_name)


def find_again(
    table: Table, wanted: Sequence[Column], columns: Mapping[str, str], *, leave_out: Collection[str] = ()
) -> dict[str, str]:
    """Return the columns of a run in another table: all of `columns`, except those in `leave_out`.

    Each is found by its name in the training table, or else as in `find_columns`. A column with the name or an alias of one
    in `leave_out` is not used for another.

    Raises `UserError` if one of them is not found.
    """
    found = {
        name: column for name, column in columns.items() if column in table.columns and name not in leave_out
    }
    aside = {columns[name].casefold() for name in leave_out if name in columns}
    for column in wanted:
        if column.name in leave_out:
            aside |= {column.name.casefold(), *map(str.casefold, column.aliases)}
    for name in table.columns:
        if name.casefold() in aside and name not in found.values():
            found[f"not {name}"] = name  # no column that is wanted has this key
    sought = [column for column in wanted if column.name in columns and column.name not in leave_out]
    again = _find(table, sought, found, _how_to_rename)
    for column in sought:
        if column.name not in again:
            raise UserError(
                f"{table.source} has no column {column.name!r}, which the training rows had "
                f"(as {columns[column.name]!r}; columns here: {listing(table.columns)}). Add it"
            )
    return again


def _find(
    table: Table,
    wanted: Sequence[Column],
    found: dict[str, str],
    remedy: Callable[[Mapping[str, str], Sequence[Column]], str],
) -> dict[str, str]:
    names = [(column, column.name) for column in wanted]
    names += [(column, alias) for column in wanted for alias in column.aliases]
    for column, name in names:
        if column.name not in found:
            match = _match(table, name, found, remedy(found, wanted))
            if match is not None:
                found[column.name] = match
    missing = [column for column in wanted if column.required and column.name not in found]
    for column in sorted(missing, key=lambda column: column.kind != "label"):
        candidates = _candidates(table, column, found, wanted)
        if len(candidates) != 1:
            raise UserError(_not_found(table, column, candidates, remedy(found, wanted)))
        _refuse_row_as_header(table, candidates[0])
        found[column.name] = candidates[0]
    return {column.name: found[column.name] for column in wanted if column.name in found}


def _refuse_row_as_header(table: Table, name: str) -> None:
    """Raise `UserError` if the name of a column found by type looks like one of its values.

    Such a file has no header, and its first row was read as one.
    """
    values = [str(value).strip() for value in table.columns[name] if value is not None]
    same = sum(value == name.strip() for value in values)
    if same:
        seen = f"{name!r} is also the value of {same:,} of its rows"
    elif _is_whole(name) or _is_decimal(name):
        seen = f"{name!r} is a number"
    elif len(name.split()) >= SENTENCE and sum(len(value.split()) > 2 for value in values) * 2 > len(values):
        seen = f"{name!r} reads like one of its texts"
    else:
        return
    raise UserError(
        f"{table.source} seems to have no header: its columns are {listing(map(repr, table.columns))}, and {seen}. Add a "
        "header line, such as text,label. If these are the names, set data.columns={text: ..., label: ...}"
    )


def _is_decimal(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _check_named(table: Table, wanted: Sequence[Column], named: Mapping[str, str]) -> dict[str, str]:
    known = [column.name for column in wanted]
    found: dict[str, str] = {}
    for key, name in named.items():
        if key not in known:
            raise UserError(
                f"data.columns names '{key}', which this task does not use (it uses: {listing(known)})."
                f"{nearest(str(key), known)}"
            )
        if name not in table.columns:
            raise UserError(
                f"column '{name}' is not in {table.source} (columns: {listing(table.columns)})."
                f"{nearest(str(name), table.columns)}"
            )
        if name in found.values():
            other = next(earlier for earlier, taken in found.items() if taken == name)
            raise UserError(
                f"data.columns gives column '{name}' to both '{other}' and '{key}'. Choose two different columns"
            )
        found[key] = name
    return found


def _match(table: Table, name: str, found: Mapping[str, str], remedy: str) -> str | None:
    left = [column for column in table.columns if column not in found.values()]
    if name in left:
        return name
    matches = [column for column in left if column.casefold() == name.casefold()]
    if len(matches) > 1:
        raise UserError(
            f"{table.source} has columns '{matches[0]}' and '{matches[1]}', which differ only in "
            f"case. {remedy}"
        )
    return matches[0] if matches else None


def _candidates(
    table: Table, column: Column, found: Mapping[str, str], wanted: Sequence[Column]
) -> list[str]:
    """Return the unused columns that look like `column`; it is found if there is exactly one."""
    profiles = {
        name: _profile(values) for name, values in table.columns.items() if name not in found.values()
    }
    strings = {name: seen.mean_length for name, seen in profiles.items() if seen.kind == "string"}
    longest = max(strings, key=strings.__getitem__, default=None)
    if column.kind == "text":
        if sum(other.kind == "text" and other.required for other in wanted) > 1:
            return []  # their values do not tell which text is which
        return [name for name, length in strings.items() if length * 2 > strings[longest or name]]
    needs_text = any(other.kind == "text" and other.required and other.name not in found for other in wanted)
    return [
        name
        for name, seen in profiles.items()
        if seen.kind != "other"
        and seen.distinct <= max(2, seen.filled / 2)
        and not (needs_text and name == longest)
    ]


def _profile(values: Sequence[Any]) -> _Profile:
    filled = [value for value in values if value is not None and not (isinstance(value, str) and not value)]
    if filled and all(map(_is_whole, filled)):
        kind = "whole"
    elif filled and all(isinstance(value, str) for value in filled):
        kind = "string"
    else:  # also images and sounds, whose text form is long
        return _Profile("other", len(filled), len(filled), 0.0)
    length = sum(len(str(value)) for value in filled) / len(filled)
    return _Profile(kind, len(set(filled)), len(filled), length)


def _is_whole(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().removeprefix("-").isdecimal()
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _not_found(table: Table, column: Column, candidates: Sequence[str], remedy: str) -> str:
    if candidates:
        choice = " or ".join(f"'{name}'" for name in candidates)
        problem = f"the {column.name} of {table.source} could be {choice}"
    else:
        problem = f"no column of {table.source} looks like the {column.name}"
    return f"{problem} (columns: {listing(table.columns)}). {remedy}"


def _how_to_name(found: Mapping[str, str], wanted: Sequence[Column]) -> str:
    shown = [column.name for column in wanted if column.required or column.name in found]
    pairs = ", ".join(f"{name}: {found.get(name, '...')}" for name in shown)
    return f"Name them in the recipe: data.columns={{{pairs}}}"


def _how_to_rename(found: Mapping[str, str], wanted: Sequence[Column]) -> str:
    missing = [column.name for column in wanted if column.name not in found]
    return f"Rename the columns to match the training rows, or to: {listing(missing)}"
