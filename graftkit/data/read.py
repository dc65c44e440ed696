"""Tables from files and Python objects; a bad row is an error that names its place, or is left out."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftkit.data.encoding import decode
from graftkit.errors import UserError, listing, nearest

FORMATS = {
    "csv": (".csv",),
    "tsv": (".tsv", ".tab", ".txt"),
    "json lines": (".jsonl", ".ndjson"),
    "json": (".json",),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
}
SUFFIXES = {suffix: kind for kind, suffixes in FORMATS.items() for suffix in suffixes}


@dataclass(frozen=True)
class Table:
    """Columns of one length, and where each row stands in what the user handed over.

    `numbers` holds for each row the line on which it starts (`unit` 'line', the first line of the file
    is 1) or its place (`unit` 'row', the first row is 1). `skipped` has a message for each row left out.
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
        """The rows at these indices, in this order, with the numbers they had."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(columns, self.source, [self.numbers[row] for row in rows], self.unit, self.skipped)


@dataclass
class _BadRows:
    """Stops at the first bad row, or collects a message for each."""

    source: str
    unit: str
    skip: bool
    messages: list[str] = field(default_factory=list)

    def add(self, number: int, problem: str) -> None:
        message = f"{self.source}, {self.unit} {number}: {problem}"
        if not self.skip:
            raise UserError(f"{message}. Mend it, or leave out such rows with data.skip_bad=true")
        self.messages.append(message)

    def table(self, columns: dict[str, list[Any]], numbers: list[int]) -> Table:
        """The rows that are left.

        Raises UserError where none is."""
        if not numbers and self.messages:
            count = len(self.messages)
            raise UserError(
                f"{self.source} has no good row: all {count} are bad. The first: {self.messages[0]}"
            )
        if not numbers:
            header = f" (columns: {listing(columns)})" if columns else ""
            raise UserError(f"{self.source} has no rows{header}. Add at least one")
        if not columns:
            raise UserError(
                f"{self.source} has {len(numbers)} rows and no columns. Give each row named values"
            )
        return Table(columns, self.source, numbers, self.unit, tuple(self.messages))


def read_table(source: Any, *, encoding: str = "utf-8", skip_bad: bool = False, name: str = "data") -> Table:
    """Read a table from a path, or from what Python holds; nothing that is handed over is changed.

    A path's suffix gives its format (`SUFFIXES`). Otherwise `source` is a list of dicts, a dict of lists, a
    `datasets.Dataset` (integers of a `ClassLabel` become its names) or a pandas DataFrame, and messages
    call it '`name` (in memory)'. Values of CSV and TSV stay strings; a missing value elsewhere is None.

    Raises UserError for a file that cannot be read or holds no rows, for column names that are empty or
    repeated, and for the first bad row unless `skip_bad`, which leaves out and counts such rows.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_file(os.fspath(source), encoding, skip_bad)
    return _read_memory(source, _BadRows(f"{name} (in memory)", "row", skip_bad))


def _read_file(source: str, encoding: str, skip_bad: bool) -> Table:
    path = Path(source).expanduser() if source.startswith("~") else Path(source)
    raw = _read_bytes(path, source)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        ending = f"the ending '{path.suffix}'" if path.suffix else "no ending"
        raise UserError(f"{source} has {ending}, which is not one of those known ({listing(SUFFIXES)})")
    if not raw:
        raise UserError(f"{source} is empty. Write rows into it or name another file")
    lines = _BadRows(source, "line", skip_bad)
    if kind in ("parquet", "arrow"):
        return _read_arrow(raw, kind, _BadRows(source, "row", skip_bad))
    text = decode(raw, source, encoding)
    if not text.strip():
        raise UserError(f"{source} is empty. Write rows into it or name another file")
    if kind == "csv":
        return _read_csv(text, lines)
    if kind == "tsv":
        if path.suffix.lower() == ".txt" and "\t" not in text.lstrip("\r\n").splitlines()[0]:
            raise UserError(
                f"{source} has no tab in its first line, so it is no table. Known: {listing(SUFFIXES)}"
            )
        return _read_tsv(text, lines)
    if kind == "json lines":
        return _read_json_lines(text, lines)
    return _read_json(text, lines)


def _read_bytes(path: Path, source: str) -> bytes:
    try:
        if path.is_dir():
            files = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
            found = f"one of its files: {listing(files)}" if files else "a file"
            raise UserError(f"'{source}' is a folder where a file should be. Name {found}")
        return path.read_bytes()
    except FileNotFoundError:
        folder = path.parent
        if not folder.is_dir():
            raise UserError(f"{source} does not exist: there is no folder {folder}. Mend the path") from None
        try:
            hint = nearest(path.name, sorted(os.listdir(folder)))
        except OSError:
            hint = ""
        raise UserError(f"{source} does not exist.{hint or ' Mend the path'}") from None
    except PermissionError:
        raise UserError(
            f"{source} may not be read by this user. Change its permissions (chmod u+r)"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source} cannot be read: {reason}") from None


def _check_names(names: Sequence[Any], where: str) -> None:
    for place, name in enumerate(names, start=1):
        if not isinstance(name, str):
            raise UserError(f"{where}: the name of column {place} is {name!r}, not a string. Rename it")
        if not name:
            hint = " (pandas writes its index so: use index=False)" if place == 1 else ""
            raise UserError(f"{where}: column {place} of {len(names)} has no name{hint}. Name or remove it")
        if name in names[: place - 1]:
            first = names.index(name) + 1
            raise UserError(f"{where}: columns {first} and {place} are both named '{name}'. Rename one")


def _read_csv(text: str, bad: _BadRows) -> Table:
    head = next(line for line in text.splitlines() if line.strip())
    delimiter = next((mark for mark in ",;\t" if mark in head), ",")
    return _from_fields(
        _csv_records(text, delimiter, bad), f"a text with '{delimiter}' stands in double quotes", bad
    )


def _csv_records(text: str, delimiter: str, bad: _BadRows) -> Iterator[tuple[int, int, list[str]]]:
    """First line, last line and fields of each record. After an unbalanced quote, reading goes on at the
    line below it, so that the quote costs one row and not all up to the next quote."""
    lines = list(io.StringIO(text, newline=""))
    first, seen = 0, False
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        while first < len(lines):
            rest = (lines[index] for index in range(first, len(lines)))
            reader, start = csv.reader(rest, delimiter=delimiter, strict=True), first
            try:
                for record in reader:
                    end = first + reader.line_num
                    if "".join(lines[start:end]).strip():
                        yield start + 1, end, record
                        seen = True
                    start = end
                return
            except csv.Error as error:
                opened = _opening_quote(lines, start, first + reader.line_num, delimiter)
                problem = (
                    "the double quote opened here is not closed at the end of a field "
                    f"(line {first + reader.line_num}: {error}). Write a quote inside a quoted text twice"
                )
                if not seen:
                    raise UserError(f"{bad.source}, line {opened + 1}: {problem}") from None
                bad.add(opened + 1, problem)
                first = opened + 1
    finally:
        csv.field_size_limit(limit)


def _opening_quote(lines: list[str], start: int, end: int, delimiter: str) -> int:
    """The index of the line on which the first field that is not well formed in `lines[start:end]` begins."""
    text, at, line = "".join(lines[start:end]), 0, start
    ends = re.escape(delimiter)
    whole = re.compile(rf'(?:"(?:[^"]|"")*+"|(?!")[^{ends}\r\n]*)(?:{ends}|\r\n|\r|\n|\Z)')
    while (found := whole.match(text, at)) and found.end() > at:
        at = found.end()
    while line < end - 1 and at >= len(lines[line]):
        at -= len(lines[line])
        line += 1
    return line


def _read_tsv(text: str, bad: _BadRows) -> Table:
    lines = text.split("\n") if "\n" in text else text.split("\r")
    records = (
        (number, number, [_unquote(value) for value in line.removesuffix("\r").split("\t")])
        for number, line in enumerate(lines, start=1)
        if line.strip("\r") and not line.isspace()
    )
    return _from_fields(records, "a text cannot hold a tab", bad)


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"' or '"' in value[1:-1].replace('""', ""):
        return value
    return value[1:-1].replace('""', '"')


def _from_fields(records: Iterator[tuple[int, int, list[str]]], remedy: str, bad: _BadRows) -> Table:
    line, _, header = next(records)
    header = [name.strip() for name in header]
    _check_names(header, f"{bad.source}, line {line} (the header)")
    rows, numbers = [], []
    for start, end, fields in records:
        if len(fields) == len(header):
            rows.append(fields)
            numbers.append(start)
            continue
        count = f"{len(fields)} field{'' if len(fields) == 1 else 's'}"
        problem = f"{count} where the header has {len(header)} (columns: {listing(header)})"
        if end > start:
            problem += f"; a double quote makes lines {start} to {end} one row"
        elif len(fields) > len(header):
            problem += f"; {remedy}"
        bad.add(start, problem)
    return bad.table({name: [row[place] for row in rows] for place, name in enumerate(header)}, numbers)


def _read_json_lines(text: str, bad: _BadRows) -> Table:
    def records() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                bad.add(number, f"not JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                bad.add(number, f"not JSON that can be read: {error}")
            else:
                yield number, record

    return _from_records(records(), bad, "\\ud" in text.lower())


def _read_json(text: str, bad: _BadRows) -> Table:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" or not text.lstrip().startswith("["):
            return _read_json_lines(text, bad)
        raise UserError(
            f"{bad.source}, line {error.lineno}: the list is not JSON: {error.msg} at column {error.colno}. "
            "Mend it, or write one object on each line (JSON lines), where bad rows can be left out"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{bad.source} is not JSON that can be read: {error}") from None
    if isinstance(whole, list):
        bad.unit = "row"
        return _from_records(enumerate(whole, start=1), bad, "\\ud" in text.lower())
    if not isinstance(whole, dict) or any(
        isinstance(value, list) and value and isinstance(value[0], dict) for value in whole.values()
    ):
        keys = f" (keys: {listing(whole)})" if isinstance(whole, dict) else ""
        raise UserError(
            f"{bad.source} is one {_json_kind(whole)}{keys}. Write a list of objects, or one on each line"
        )
    return _read_json_lines(json.dumps(whole), bad)


def _json_kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number" if isinstance(value, (int, float)) else type(value).__name__)


def _from_records(records: Iterable[tuple[int, Any]], bad: _BadRows, check_text: bool = False) -> Table:
    rows, numbers, names = [], [], {}
    for number, record in records:
        if not isinstance(record, Mapping):
            bad.add(number, f"a {_json_kind(record)} where an object with named values should be")
            continue
        if check_text and re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False)):
            bad.add(
                number, "half of a surrogate pair (\\ud800 to \\udfff) stands alone, which is no character"
            )
            continue
        rows.append(record)
        numbers.append(number)
        names.update(dict.fromkeys(record))
    _check_names(list(names), bad.source)
    return bad.table({name: [row.get(name) for row in rows] for name in names}, numbers)


def _read_arrow(raw: bytes, kind: str, bad: _BadRows) -> Table:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    buffer = pyarrow.BufferReader(raw)
    try:
        if kind == "parquet":
            table = pyarrow.parquet.ParquetFile(buffer).read()
        elif raw.startswith((b"ARROW1", b"FEA1")):
            table = pyarrow.feather.read_table(buffer)
        else:  # what `datasets` writes: the streaming format
            table = pyarrow.ipc.open_stream(buffer).read_all()
        _check_names(table.column_names, bad.source)
        kept = [name for name in table.column_names if not name.startswith("__index_level_")]  # pandas' index
        columns = {name: table.column(name).to_pylist() for name in kept}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{bad.source} is not a whole {kind.title()} file: {reason}. Write it again"
        ) from None
    return bad.table(columns, list(range(1, table.num_rows + 1)))


def _read_memory(source: Any, bad: _BadRows) -> Table:
    if hasattr(source, "column_names"):  # datasets
        if not hasattr(source, "to_dict"):
            splits = f" (splits: {listing(source)})" if isinstance(source, Mapping) else ""
            raise UserError(
                f"{bad.source} is a {type(source).__name__}{splits}. Hand over one datasets.Dataset"
            )
        columns = source.to_dict()
        for name, feature in (getattr(source, "features", None) or {}).items():
            if name in columns and (classes := getattr(feature, "names", None)):
                columns[name] = [None if value in (None, -1) else classes[value] for value in columns[name]]
    elif hasattr(source, "columns") and hasattr(source, "iloc"):  # pandas
        _check_names(list(source.columns), bad.source)
        columns = {
            name: [None if gone else value for value, gone in zip(source[name].tolist(), source[name].isna())]
            for name in source.columns
        }
    elif isinstance(source, Mapping):
        columns = {
            name: _as_list(values, f"{bad.source}, column '{name}'") for name, values in source.items()
        }
    elif isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        return _from_records(enumerate(source, start=1), bad)
    else:
        raise UserError(
            f"{bad.source} is a {type(source).__name__}. Hand over a path, a list of dicts, a dict of lists, "
            "a datasets.Dataset or a pandas DataFrame"
        )
    _check_names(list(columns), bad.source)
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = listing(f"{name} {length}" for name, length in lengths.items())
        raise UserError(
            f"{bad.source}: columns differ in length ({told}). Give each the same number of values"
        )
    return bad.table(columns, list(range(1, next(iter(lengths.values()), 0) + 1)))


def _as_list(values: Any, where: str) -> list[Any]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise UserError(f"{where}: a {type(values).__name__} where a list of values should be")
    return list(values)
