"""Read tables from files and Python objects. A bad row raises an error with its position, or is skipped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftkit.data.encoding import decode
from graftkit.data.json_text import parse_json
from graftkit.data.rows import (
    by_column,
    fields_of,
    good_fields,
    good_records,
    json_kind,
    json_line_records,
    read_header,
)
from graftkit.data.table import SUFFIXES, BadRows, Table, check_names
from graftkit.data.unpacked import open_parquet, refuse_inflated, text_bytes
from graftkit.errors import UserError, listing, nearest
from graftkit.files import PERMIT, POINTER, fault, special


def read_table(source: Any, *, encoding: str = "utf-8", skip_bad: bool = False, name: str = "data") -> Table:
    """Read a table from a path or a Python object, which is not modified.

    A path's suffix gives its format (`SUFFIXES`). Otherwise `source` is a list of dicts, a dict of lists, a
    `datasets.Dataset` (integers of a `ClassLabel` become its names) or a pandas DataFrame, and messages
    call it '`name` (in memory)'. Values of CSV and TSV stay strings; a missing value elsewhere is None.

    Raises UserError for a file that cannot be read or holds no rows, for column names that are empty or
    repeated, and for the first bad row unless `skip_bad`, which leaves out and counts such rows.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_file(os.fspath(source), encoding, skip_bad)
    return _read_memory(source, BadRows(f"{name} (in memory)", "row", skip_bad))


def _read_file(source: str, encoding: str, skip_bad: bool) -> Table:
    path, kind = find_file(source)
    with telling_why(path, source):
        raw = path.read_bytes()
    if raw.startswith(POINTER):
        raise UserError(f"{source} {fault(path)}.")
    bad = BadRows(source, "line", skip_bad)
    if kind in ("parquet", "arrow"):
        return _read_arrow(raw, kind, BadRows(source, "row", skip_bad))
    text = decode(raw, source, encoding)
    check_text(text, path, source)
    if kind in ("csv", "tsv"):
        records, remedy = fields_of(kind, text, [text], bad)
        header = read_header(records, bad)
        good = list(good_fields(records, header, remedy, bad))
        return bad.table(by_column(header, [fields for _, fields in good]), [line for line, _ in good])
    if kind == "json lines":
        return _from_records(json_line_records(text.split("\n"), bad), bad)
    return _read_json(text, bad)


def find_file(source: str) -> tuple[Path, str]:
    """Return the path and the format of a file of rows. Raises `UserError` if it cannot be opened, has an unknown format
    or is empty."""
    path = Path(source).expanduser() if source.startswith("~") else Path(source)
    with telling_why(path, source), path.open("rb") as file:
        empty = not file.read(1)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        ending = f"the ending '{path.suffix}'" if path.suffix else "no ending"
        raise UserError(f"{source} has {ending}, which is not one of those known ({listing(SUFFIXES)})")
    if empty:
        raise UserError(f"{source} is empty. Write rows into it or name another file")
    return path, kind


def check_text(head: str, path: Path, source: str) -> None:
    """Raise `UserError` if the beginning of a text cannot be that of a table."""
    if not head.strip():
        raise UserError(f"{source} is empty. Write rows into it or name another file")
    if path.suffix.lower() == ".txt" and "\t" not in head.lstrip("\r\n").splitlines()[0]:
        raise UserError(
            f"{source} has no tab in its first line, so it is not a table. Supported: {listing(SUFFIXES)}"
        )


@contextmanager
def telling_why(path: Path, source: str) -> Iterator[None]:
    """Raise the operating system's errors on a file as `UserError`."""
    try:
        if path.is_dir():
            files = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
            found = f"one of its files: {listing(files)}" if files else "a file"
            raise UserError(f"'{source}' is a folder where a file should be. Name {found}")
        if (kind := special(path)) is not None:
            raise UserError(f"{source} is {kind}, not a file. Write its rows to a file and name that")
        yield
    except FileNotFoundError:
        folder = path.parent
        if not folder.is_dir():
            raise UserError(f"{source} does not exist: there is no folder {folder}. Check the path") from None
        try:
            hint = nearest(path.name, sorted(os.listdir(folder)))
        except OSError:
            hint = ""
        raise UserError(f"{source} does not exist.{hint or ' Check the path'}") from None
    except PermissionError:
        raise UserError(f"{source} may not be read by this user: {PERMIT}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source} cannot be read: {reason}") from None


def _read_json(text: str, bad: BadRows) -> Table:
    try:
        whole = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" or not text.lstrip().startswith("["):
            return _from_records(json_line_records(text.split("\n"), bad), bad)
        raise UserError(
            f"{bad.source}, line {error.lineno}: the list is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}. "
            "Fix it, or write one object per line (JSON lines), so that bad rows can be skipped"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{bad.source} is not JSON that can be read: {error}") from None
    if isinstance(whole, list):
        bad.unit = "row"
        return _from_records(good_records(enumerate(whole, start=1), bad, "\\ud" in text.lower()), bad)
    if not isinstance(whole, dict) or any(
        isinstance(value, list) and value and isinstance(value[0], dict) for value in whole.values()
    ):
        keys = f" (keys: {listing(whole)})" if isinstance(whole, dict) else ""
        raise UserError(
            f"{bad.source} is one {json_kind(whole)}{keys}. Write a list of objects, or one on each line"
        )
    return _from_records(json_line_records([json.dumps(whole)], bad), bad)


def _from_records(records: Iterable[tuple[int, Mapping]], bad: BadRows) -> Table:
    rows, numbers, names = [], [], {}
    for number, record in records:
        rows.append(record)
        numbers.append(number)
        names.update(dict.fromkeys(record))
    check_names(list(names), bad.source)
    return bad.table({name: [row.get(name) for row in rows] for name in names}, numbers)


def _read_arrow(raw: bytes, kind: str, bad: BadRows) -> Table:
    import pyarrow
    import pyarrow.feather

    buffer = pyarrow.BufferReader(raw)
    try:
        if kind == "parquet":
            table = open_parquet(buffer, len(raw), bad.source).read()
        elif raw.startswith((b"ARROW1", b"FEA1")):
            table = pyarrow.feather.read_table(buffer)
        else:  # what `datasets` writes: the streaming format
            table = pyarrow.ipc.open_stream(buffer).read_all()
        table.validate(full=True)  # pyarrow itself would read beyond the ends of damaged buffers
        kept = keep_columns(table.column_names, bad.source)
        unpacked = sum(text_bytes(table.column(name)) for name in kept)
        refuse_inflated(unpacked, table.num_rows * len(kept), len(raw), bad.source)
        columns = {name: table.column(name).to_pylist() for name in kept}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise broken(bad.source, kind, error) from None
    return bad.table(columns, list(range(1, table.num_rows + 1)))


def keep_columns(names: list[str], source: str) -> list[str]:
    """Return the columns of a Parquet or Arrow file except pandas' index."""
    check_names(names, source)
    return [name for name in names if not name.startswith("__index_level_")]


def broken(source: str, kind: str, error: Exception) -> UserError:
    """Return the error for a Parquet or Arrow file that cannot be read to its end."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{source} is not a whole {kind.title()} file: {reason}. Write it again")


def _read_memory(source: Any, bad: BadRows) -> Table:
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
        check_names(list(source.columns), bad.source)
        columns = {
            name: [None if gone else value for value, gone in zip(source[name].tolist(), source[name].isna())]
            for name in source.columns
        }
    elif isinstance(source, Mapping):
        columns = {
            name: _as_list(values, f"{bad.source}, column '{name}'") for name, values in source.items()
        }
    elif isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        return _from_records(good_records(enumerate(source, start=1), bad), bad)
    else:
        raise UserError(
            f"{bad.source} is a {type(source).__name__}. Hand over a path, a list of dicts, a dict of lists, "
            "a datasets.Dataset or a pandas DataFrame"
        )
    check_names(list(columns), bad.source)
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
