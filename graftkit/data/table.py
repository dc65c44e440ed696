"""A table of rows in memory, and the bad rows that were found while it was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graftkit.errors import NoGoodRows, UserError, listing

FORMATS = {
    "csv": (".csv",),
    "tsv": (".tsv", ".tab", ".txt"),
    "json lines": (".jsonl", ".ndjson"),
    "json": (".json",),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
}
SUFFIXES = {suffix: kind for kind, suffixes in FORMATS.items() for suffix in suffixes}


COLUMNS = 2_000  # at most
LONGEST = 10_000_000  # characters of a value; a long book has five million


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and the position of each row in the user's data.

    `numbers` holds for each row the line on which it starts (`unit` 'line', counted from 1) or its position (`unit` 'row',
    counted from 1). `skipped` has a message for each skipped row.
    """

    columns: dict[str, list[Any]]
    source: str
    numbers: list[int]
    unit: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, row: int) -> str:
        """`"train.csv, line 17"` for the row at index `row`."""
        return f"{self.source}, {self.unit} {self.numbers[row]}"

    def take(self, rows: Sequence[int]) -> Table:
        """Return the rows at these indices, in this order, with their original numbers."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(columns, self.source, [self.numbers[row] for row in rows], self.unit, self.skipped)


@dataclass
class BadRows:
    """Raise at the first bad row, or collect a message for each."""

    source: str
    unit: str
    skip: bool
    messages: list[str] = field(default_factory=list)

    def add(self, number: int, problem: str) -> None:
        message = f"{self.source}, {self.unit} {number}: {problem}"
        if not self.skip:
            raise UserError(f"{message}. Fix the row, or skip bad rows with data.skip_bad=true")
        self.messages.append(message)

    def table(self, columns: dict[str, list[Any]], numbers: list[int]) -> Table:
        """Return the table of the good rows. Raises UserError if there are none."""
        if not numbers and self.messages:
            count = len(self.messages)
            raise NoGoodRows(
                f"{self.source} has no good row: all {count} are bad. The first: {self.messages[0]}",
                self.messages,
            )
        if not numbers:
            header = f" (columns: {listing(columns)})" if columns else ""
            raise UserError(f"{self.source} has no rows{header}. Add at least one")
        if not columns:
            raise UserError(
                f"{self.source} has {len(numbers)} rows and no columns. Give each row named values"
            )
        return Table(columns, self.source, numbers, self.unit, tuple(self.messages))


def check_names(names: Sequence[Any], where: str) -> None:
    """Raise `UserError` for a column without a name, or two with the same name, or too many columns."""
    if len(names) > COLUMNS:
        raise UserError(
            f"{where}: there are {len(names):,} columns, and at most {COLUMNS:,} are read. Leave out those that are not "
            "needed, or check that the values are in rows and not in columns"
        )
    for place, name in enumerate(names, start=1):
        if not isinstance(name, str):
            raise UserError(f"{where}: the name of column {place} is {name!r}, not a string. Rename it")
        if not name:
            hint = " (pandas writes its index so: use index=False)" if place == 1 else ""
            raise UserError(f"{where}: column {place} of {len(names)} has no name{hint}. Name or remove it")
        if name in names[: place - 1]:
            first = names.index(name) + 1
            raise UserError(f"{where}: columns {first} and {place} are both named '{name}'. Rename one")
