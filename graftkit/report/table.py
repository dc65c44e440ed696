"""Write answers to files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from graftkit.claims import TEMPORARY, claimed, remove_leftovers
from graftkit.errors import UserError
from graftkit.files import replacing

KINDS = (".jsonl", ".csv", ".tsv", ".parquet")


def check_path(path: Path, source: str | None, overwrite: bool) -> None:
    """Raise `UserError` unless answers to the rows of the file `source` may be written to `path`."""
    if path.suffix.lower() not in KINDS:
        raise UserError(
            f"answers cannot be written as {path.name!r}; use a name that ends in {', '.join(KINDS[:-1])} or {KINDS[-1]}."
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


@contextmanager
def held(path: Path) -> Iterator[Path]:
    """Hold a file, so that no other process writes answers to it. Yield a folder beside it for what is not complete."""
    folder = path.absolute().with_name(path.name + TEMPORARY)
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(claimed(folder))
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None
            remove_leftovers(folder)
            yield folder
    finally:
        with suppress(OSError):  # left by a killed process, and empty by now
            folder.rmdir()


@contextmanager
def writing(path: Path, folder: Path | None = None) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yield a function that appends rows to a CSV (.csv), TSV (.tsv), Parquet (.parquet) or JSON lines (.jsonl) file.

    The file is complete if the block succeeds, and absent otherwise; until then it is written in `folder`, or beside its
    place. In CSV and TSV, cells with lists and dictionaries are JSON. The first rows determine the columns; see
    `check_path`.
    """
    kind = path.suffix.lower()
    with replacing(path, folder) as temporary:
        if kind == ".parquet":
            with _parquet(path, temporary) as write:
                yield write
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            if kind == ".jsonl":
                yield lambda rows: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            else:
                yield _Cells(path, file, "," if kind == ".csv" else "\t").write


class _Cells:
    """A writer of CSV or TSV."""

    def __init__(self, path: Path, file: TextIO, delimiter: str) -> None:
        self.path = path
        self.writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        self.columns: list[str] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        if not self.columns:
            self.columns = names
            self.writer.writerow(names)
        if other := set(names) - set(self.columns):
            raise UserError(
                f"{self.path}: an answer has {sorted(other)[0]!r}, which the first answers do not, so there is no column "
                "for it; write JSON lines (.jsonl)."
            )
        self.writer.writerows([_cell(row.get(name)) for name in self.columns] for row in rows)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else value


@contextmanager
def _parquet(path: Path, temporary: Path) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yield a writer of Parquet. The first rows determine the column types; an all-null column is text."""
    import pyarrow
    import pyarrow.parquet

    writer: Any = None

    def write(rows: list[dict[str, Any]]) -> None:
        nonlocal writer
        try:
            if writer is None:
                names = dict.fromkeys(name for row in rows for name in row)
                columns = {name: pyarrow.array([row.get(name) for row in rows]) for name in names}
                fields = [
                    (n, pyarrow.string() if c.null_count == len(c) else c.type) for n, c in columns.items()
                ]
                writer = pyarrow.parquet.ParquetWriter(temporary, pyarrow.schema(fields))
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=writer.schema))
        except pyarrow.ArrowException as error:
            raise UserError(
                f"{path}: the answers do not have the same types throughout ({error}); write JSON lines (.jsonl)."
            ) from None

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()
