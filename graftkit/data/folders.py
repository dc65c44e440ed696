"""Tables of files: a folder with one sub-folder for each class, a table that points to files, or a list of paths."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftkit.data.read import read_table
from graftkit.data.stream import slices, stream_table
from graftkit.data.table import SUFFIXES, Table
from graftkit.errors import UserError, listing, nearest
from graftkit.files import special

LITTER = (
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "__macosx",
    "icon\r",
)  # beside all that begins with a dot
LABELLED = ("train", "eval", "test")  # of what is read, that which needs labels; `predict` reads 'data'
SHOWN = 10  # problems in one message
LABEL = "label"


@dataclass(frozen=True)
class FileTable(Table):
    """A table with a column of files. `folder`: base of relative paths; `places`: the file of each row, if rows are files
    without a table, so that messages name it."""

    folder: str = ""
    places: tuple[str, ...] = ()

    def where(self, row: int) -> str:
        """`"pets/cats/tom.jpg"`, or `"pets.csv, line 17"` where a table points to files."""
        return self.places[row] if self.places else super().where(row)

    def take(self, rows: Sequence[int]) -> FileTable:
        part = super().take(rows)
        places = tuple(self.places[row] for row in rows) if self.places else ()
        return FileTable(
            part.columns, part.source, part.numbers, part.unit, part.skipped, self.folder, places
        )


def read_files(
    source: Any, *, suffixes: Collection[str], column: str, noun: str, name: str = "data",
    encoding: str = "utf-8", skip_bad: bool = False,
) -> FileTable:  # fmt: skip
    """Read a table with a row for each file; messages call a file a `noun`, such as 'image'.

    `source` is a folder with a sub-folder for each class, whose name is the label of the files in it at any depth; a
    folder of files alone, which has no labels; one file with one of the `suffixes` (lower case, with the dot); or all
    that `read_table` reads, in which `locate_files` finds the files of a column. Files come in the order of their
    names. What is hidden, and the litter of file managers, is not looked at.

    Raises UserError for a folder without such files, or with one class to train on; and, unless `skip_bad`, one that
    tells of all files with another suffix, links that leave the folder or lead nowhere, and classes without files.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(os.fspath(source)).expanduser()
        if path.is_dir():
            return _read_folder(path, suffixes, column, noun, name, skip_bad)
        if path.suffix.lower() in suffixes and path.is_file():
            return _of_paths([str(path)], column, str(path))
        if path.suffix.lower() not in SUFFIXES and not path.exists() and name in LABELLED:
            siblings = os.listdir(path.parent) if path.parent.is_dir() else []
            raise UserError(
                f"{path} does not exist.{nearest(path.name, siblings) or ' Check the path.'} {_wanted(noun)}"
            )
        if path.is_file() and path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is neither a folder nor a table ({listing(SUFFIXES)}). {_wanted(noun)}")
        table = read_table(path, encoding=encoding, skip_bad=skip_bad, name=name)
        return _as_files(table, str(path.parent))
    if _is_list_of_paths(source, column):
        return _of_paths([os.fspath(row[column]) for row in source], column, f"{name} (in memory)")
    return _as_files(read_table(source, encoding=encoding, skip_bad=skip_bad, name=name), "")


def stream_files(
    source: Any, *, suffixes: Collection[str], column: str, noun: str, name: str = "data",
    encoding: str = "utf-8", skip_bad: bool = False, rows: int,
) -> Iterator[Table]:  # fmt: skip
    """Yield what `read_files` returns as tables of at most `rows` rows; of a table file one piece at a time is in memory."""
    path = Path(source).expanduser() if isinstance(source, (str, os.PathLike)) else None
    if path is not None and path.is_file() and path.suffix.lower() in SUFFIXES:
        for piece in stream_table(path, encoding=encoding, skip_bad=skip_bad, name=name, rows=rows):
            yield _as_files(piece, str(path.parent))
        return
    table = read_files(
        source, suffixes=suffixes, column=column, noun=noun, name=name, encoding=encoding, skip_bad=skip_bad
    )
    yield from slices(table, rows)


def locate_files(table: Table, column: str, *, noun: str, skip_bad: bool) -> tuple[list[Any], dict[int, str]]:
    """Return the values of a column with resolved paths, and a message for each row without a file.

    A value is a path, relative to the folder of the table's file; bytes of a file; what `datasets` writes,
    `{'bytes': ..., 'path': ...}`; or an object in memory, which is left as it is.

    Raises UserError that lists the missing files, their number and the first ten of them, unless `skip_bad`.
    """
    folder = table.folder if isinstance(table, FileTable) else ""
    values: list[Any] = []
    problems: dict[int, str] = {}
    missing: list[str] = []
    for row, value in enumerate(table.columns[column]):
        if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
            value = value.get("bytes") or value.get("path")
        values.append(value)
        if value is None or (isinstance(value, (str, bytes)) and not value.strip()):
            problems[row] = f"{table.where(row)}: column {column!r} is empty, where a file should be."
        elif isinstance(value, (str, os.PathLike)):
            text = os.fspath(value)
            path = Path(folder, text).expanduser() if not text.startswith("~") else Path(text).expanduser()
            values[-1] = str(path)
            found = _no_file(path, text, noun)
            if found is not None:
                where = table.where(row)
                problems[row] = f"{found}" if where == text else f"{where}: {found}"
                missing.append(problems[row].rstrip("."))
    if missing and not skip_bad:
        if len(missing) == 1:
            raise UserError(f"{missing[0]}. Fix the path, or skip bad rows with data.skip_bad=true.")
        raise UserError(
            f"{table.source}: {len(missing)} of {len(table)} rows point to no file: {'; '.join(missing[:SHOWN])}"
            f"{f'; and {len(missing) - SHOWN} more' if len(missing) > SHOWN else ''}. Paths are relative to "
            f"{folder or 'the current folder'!r}. Fix them, or skip bad rows with data.skip_bad=true."
        )
    return values, problems


def given_files(items: list[Any], column: str, noun: str) -> list[dict[str, Any]] | None:
    """Return rows of items passed to `predict`: a list of paths, or of objects; None if they already form a table.

    Raises UserError for a path without a file."""
    if not items or any(isinstance(item, Mapping) for item in items):
        return None
    for item in items:
        if isinstance(item, (str, os.PathLike)):
            found = _no_file(Path(item).expanduser(), os.fspath(item), noun)
            if found is not None:
                raise UserError(found)
    return [{column: item} for item in items]


def _no_file(path: Path, text: str, noun: str) -> str | None:
    """What is wrong with a path, as a sentence; None where a file is there."""
    if len(text) > 1000 or not text.isprintable():
        return f"{text[:80]!r} is no path."
    if "://" in text:
        return f"{text} is an address, and nothing is fetched: download the {noun} and name the file."
    try:
        if path.is_file():
            return None
        if (kind := special(path)) is not None:
            return f"{text} is {kind}, not a file."
        if path.is_dir():
            return f"{text} is a folder where one {noun} should be."
        if path.is_symlink():
            return f"{text} is a link that leads nowhere."
    except OSError as error:
        return f"{text[:80]!r} cannot be looked at ({error.strerror or error})."
    return f"{text} does not exist."


def _wanted(noun: str) -> str:
    return f"Name a folder with a sub-folder of {noun}s for each class, or a table that points to {noun}s."


def _is_list_of_paths(source: Any, column: str) -> bool:
    return (
        isinstance(source, list)
        and bool(source)
        and all(
            isinstance(row, Mapping)
            and list(row) == [column]
            and isinstance(row[column], (str, os.PathLike))
            and os.fspath(row[column])
            for row in source
        )
    )


def _of_paths(paths: list[str], column: str, source: str) -> FileTable:
    return FileTable({column: paths}, source, list(range(1, len(paths) + 1)), "file", (), "", tuple(paths))


def _as_files(table: Table, folder: str) -> FileTable:
    return FileTable(table.columns, table.source, table.numbers, table.unit, table.skipped, folder)


def _read_folder(
    folder: Path, suffixes: Collection[str], column: str, noun: str, name: str, skip_bad: bool
) -> FileTable:
    try:
        entries = _entries(folder)
        classes = [entry for entry in entries if entry.is_dir()]
        files: list[tuple[str, str | None]] = []  # path, label
        problems: list[str] = []
        for entry in entries:
            is_class = entry.is_dir()
            found = list(_walk(entry, (folder.resolve(),), suffixes, noun, problems))
            if is_class and not found:
                problems.append(f"{entry} is the folder of a class and has no {noun}s in it")
            if not is_class and classes and name in LABELLED:
                if found:
                    problems.append(f"{entry} lies beside the folders of the classes, so it has no class")
                continue
            files += [(path, entry.name if is_class else None) for path in found]
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from None
    if problems and not skip_bad:
        raise UserError(_told(folder, problems))
    if not files:
        tables = [entry.name for entry in entries if entry.suffix.lower() in SUFFIXES]
        hint = f" Or name its table: {listing(tables, 3)}." if tables else ""
        raise UserError(f"{folder} has no {noun}s ({listing(sorted(suffixes))}). {_wanted(noun)}{hint}")
    labels = {label for _, label in files if label is not None}
    if not labels and name in LABELLED:
        raise UserError(f"{folder} has {noun}s but no sub-folders, so they have no labels. {_wanted(noun)}")
    if len(labels) == 1 and name == "train":
        raise UserError(
            f"{folder} has one class only ({next(iter(labels))!r}), so there is nothing to tell apart. {_wanted(noun)}"
        )
    table = _of_paths([path for path, _ in files], column, str(folder))
    columns = {**table.columns, LABEL: [label for _, label in files]} if labels else table.columns
    return replace(table, columns=columns, skipped=tuple(f"{problem}." for problem in problems))


def _told(folder: Path, problems: list[str]) -> str:
    remedy = "Fix or remove it, or skip bad files with data.skip_bad=true."
    if len(problems) == 1:
        return f"{problems[0]}. {remedy}"
    shown = "; ".join(problems[:SHOWN])
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{folder}: {len(problems)} problems: {shown}{more}. {remedy.replace(' it,', ' them,')}"


def _entries(folder: Path) -> list[Path]:
    """What is in a folder by name, but for hidden files and litter."""
    return [
        folder / name
        for name in sorted(os.listdir(folder))
        if not name.startswith(".") and name.lower() not in LITTER
    ]


def _walk(
    entry: Path, above: tuple[Path, ...], suffixes: Collection[str], noun: str, problems: list[str]
) -> Iterator[str]:
    """Paths of the files at and below an entry; what is wrong with others goes to `problems`.

    `above`: the folders that hold the entry, without links, the whole one first.
    """
    if entry.is_symlink():
        if not entry.exists():
            problems.append(f"{entry} is a link that leads nowhere")
            return
        target = entry.resolve()
        if not target.is_relative_to(above[0]):
            problems.append(f"{entry} is a link that leaves the folder (to {target})")
            return
        if target in above:
            problems.append(f"{entry} is a link to a folder that holds it")
            return
    if entry.is_dir():
        for inner in _entries(entry):
            yield from _walk(inner, (*above, entry.resolve()), suffixes, noun, problems)
    elif (kind := special(entry)) is not None:
        problems.append(f"{entry} is {kind}, not a file")
    elif entry.suffix.lower() in suffixes:
        yield str(entry)
    else:
        ending = f"the ending '{entry.suffix}'" if entry.suffix else "no ending"
        problems.append(f"{entry} has {ending}, which no {noun} has")
