"""Read tables in pieces, so that files of any size need little memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftkit.data.encoding import decode_blocks
from graftkit.data.read import broken, check_text, find_file, keep_columns, read_table, telling_why
from graftkit.data.rows import (
    by_column,
    fields_of,
    good_fields,
    json_line_records,
    read_header,
    split_lines,
)
from graftkit.data.table import SUFFIXES, BadRows, Table, check_names
from graftkit.data.unpacked import open_parquet, refuse_inflated, text_bytes

ROWS = 4096
BLOCK = 1 << 20  # bytes
LARGE = 1 << 28  # bytes


def stream_table(
    source: Any, *, encoding: str = "utf-8", skip_bad: bool = False, name: str = "data", rows: int = ROWS
) -> Iterator[Table]:
    """Yield the rows of `read_table(source)` as tables of at most `rows` rows, with the same numbers and messages.

    CSV, TSV and JSON lines are read line by line, Parquet and Arrow by batches of rows; at any time one piece is in
    memory. A `.json` file, and what Python holds, is there as a whole. Each table has the messages of the bad rows that
    were left out since the one before; the last table may have no rows, but such messages. In JSON lines a column that
    no row has had so far is not in the table.

    Raises UserError as `read_table` does, for a bad row when its piece is asked for.
    """
    if isinstance(source, (str, os.PathLike)):
        path, kind = find_file(os.fspath(source))
        if kind in ("parquet", "arrow"):
            return _arrow_pieces(path, os.fspath(source), kind, rows)
        if kind != "json":
            return _text_pieces(path, os.fspath(source), kind, encoding, skip_bad, rows)
    return slices(read_table(source, encoding=encoding, skip_bad=skip_bad, name=name), rows)


def told_of_size(source: Any) -> str | None:
    """Return a note for a large file that has to be read into memory as a whole because it is one JSON value."""
    if not isinstance(source, (str, os.PathLike)) or SUFFIXES.get(Path(source).suffix.lower()) != "json":
        return None
    path = Path(source).expanduser()
    if not path.is_file() or path.stat().st_size < LARGE:
        return None
    return (
        f"{source} is one JSON value, so it is read as a whole; JSON lines (.jsonl) are read piece by piece."
    )


def slices(table: Table, rows: int) -> Iterator[Table]:
    """Split a table in memory into pieces; the first has the messages of the bad rows."""
    for start in range(0, len(table), rows):
        piece = table.take(range(start, min(start + rows, len(table))))
        yield replace(piece, skipped=()) if start else piece


def _blocks(path: Path, source: str) -> Iterator[bytes]:
    with telling_why(path, source), path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _text_pieces(
    path: Path, source: str, kind: str, encoding: str, skip_bad: bool, size: int
) -> Iterator[Table]:
    bad = BadRows(source, "line", skip_bad)
    coming = decode_blocks(_blocks(path, source), source, encoding)
    head = ""
    for block in coming:
        head += block
        if head.strip():
            break
    check_text(head, path, source)
    blocks = itertools.chain([head], coming)
    if kind == "json lines":
        return _record_pieces(json_line_records(split_lines(blocks, "\n"), bad), bad, size)
    records, remedy = fields_of(kind, head, blocks, bad)
    header = read_header(records, bad)
    return _field_pieces(good_fields(records, header, remedy, bad), header, bad, size)


def _field_pieces(
    good: Iterator[tuple[int, list[str]]], header: list[str], bad: BadRows, size: int
) -> Iterator[Table]:
    begun = False
    while piece := list(itertools.islice(good, size)):
        yield _piece(by_column(header, [fields for _, fields in piece]), [line for line, _ in piece], bad)
        begun = True
    yield from _end(bad, header, begun)


def _record_pieces(
    records: Iterable[tuple[int, Mapping[str, Any]]], bad: BadRows, size: int
) -> Iterator[Table]:
    records, names = iter(records), dict[str, None]()
    begun = False
    while piece := list(itertools.islice(records, size)):
        for _, record in piece:
            names.update(dict.fromkeys(record))
        check_names(list(names), bad.source)
        columns = {name: [record.get(name) for _, record in piece] for name in names}
        yield _piece(columns, [number for number, _ in piece], bad)
        begun = True
    yield from _end(bad, [], begun)


def _piece(columns: dict[str, list[Any]], numbers: list[int], bad: BadRows) -> Table:
    table = bad.table(columns, numbers)
    bad.messages = []
    return table


def _end(bad: BadRows, header: list[str], begun: bool) -> Iterator[Table]:
    """Yield the remaining messages after all rows are read."""
    if not begun:
        yield bad.table({name: [] for name in header}, [])
    elif bad.messages:
        yield Table({name: [] for name in header}, bad.source, [], bad.unit, tuple(bad.messages))


def _arrow_pieces(path: Path, source: str, kind: str, size: int) -> Iterator[Table]:
    import pyarrow

    bad, passed = BadRows(source, "row", False), 0
    with telling_why(path, source):
        try:
            for batch in _batches(path, kind, size):
                batch.validate(full=True)  # pyarrow itself would read beyond the ends of damaged buffers
                kept = keep_columns(batch.schema.names, source)
                unpacked = sum(text_bytes(batch.column(name)) for name in kept)
                refuse_inflated(unpacked, 0, path.stat().st_size, source)
                columns = {name: batch.column(name).to_pylist() for name in kept}
                passed += batch.num_rows
                yield bad.table(columns, list(range(passed - batch.num_rows + 1, passed + 1)))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise broken(source, kind, error) from None
    if not passed:
        read_table(source)  # tells that there is nothing in it


def _batches(path: Path, kind: str, size: int) -> Iterator[Any]:
    """Yield non-empty record batches of at most `size` rows."""
    import pyarrow
    import pyarrow.feather

    with pyarrow.OSFile(str(path)) as file:
        start = file.read(6)
        file.seek(0)
        batches: Iterable[Any]
        if kind == "parquet":
            batches = open_parquet(file, path.stat().st_size, str(path)).iter_batches(batch_size=size)
        elif start == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        elif start.startswith(b"FEA1"):
            batches = pyarrow.feather.read_table(file).to_batches()
        else:  # what `datasets` writes: the streaming format
            batches = pyarrow.ipc.open_stream(file)
        for batch in batches:
            for first in range(0, batch.num_rows, size):
                yield batch.slice(first, size)
