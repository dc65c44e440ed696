"""Which files a corpus consists of, and its documents as a stream."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.data.corpora.cleaning import Counts
from graftkit.data.corpora.reading import END, LONGEST, Part, Reading, is_wide, missing, text_of
from graftkit.data.corpora.stored import sample
from graftkit.data.encoding import ENCODINGS, refuse_wide_characters, suggest_encoding
from graftkit.data.json_text import parse_json
from graftkit.data.read import broken, telling_why
from graftkit.errors import UserError, listing, nearest
from graftkit.files import POINTER, fault, irregular

KINDS = {
    "text": (".txt", ".text"),
    "json lines": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
}
SUFFIXES = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}
DOCUMENTS = ("auto", "paragraphs", "lines", "file")
HEAD = 1 << 16  # bytes of a file that are looked at
FEW = 16  # control characters, and those that cannot be decoded, are cleaned if a head has no more of them
ARTICLES, ARTICLE = (
    10,
    1 << 20,
)  # text files are taken as a document each if there are as many, none of more bytes
SHARD, SMALLEST_SHARD, SHARDS = (
    1 << 26,
    1 << 20,
    16,
)  # bytes at most and at least; number if neither is reached
WHOLE = 1 << 26  # bytes; of larger files samples are compared
BLOCKS = 64  # of a sample


@dataclass(frozen=True)
class File:
    """A file of a corpus; `name` is its path below the folder that was named."""

    name: str
    path: str
    kind: str
    size: int


@dataclass(frozen=True)
class Corpus:
    """The checked files of a corpus. Nothing is read beyond the beginnings of the files until `documents` is asked for."""

    name: str
    files: tuple[File, ...]
    reading: Reading

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def documents(self) -> Iterator[str]:
        """Yield the cleaned text of each document, in the order of the files, in constant memory.

        Raises UserError for a document of more than 10 MB and for rows without text, with file and line.
        """
        counts = Counts()
        for file in self.files:
            yield from self.reading.read(Part(file.path, file.kind, file.size), counts)

    def shards(self) -> list[list[Part]]:
        """Return the parts of the files whose documents make a shard, for each shard: 1 to 64 MB, about 16 shards of a
        corpus that is not larger. They depend on the files alone.
        """
        target = min(max(self.size // SHARDS, SMALLEST_SHARD), SHARD)
        found: list[list[Part]] = [[]]
        filled = 0
        for file in self.files:
            for part, weight in self._parts(file, target):
                if filled >= target:
                    found.append([])
                    filled = 0
                found[-1].append(part)
                filled += weight
        return found

    def _parts(self, file: File, target: int) -> Iterator[tuple[Part, int]]:
        """Yield the parts of a file and their bytes, each about `target`."""
        if file.kind == "parquet":
            for group, size in enumerate(_group_sizes(file.path)):
                yield Part(file.path, file.kind, file.size, group, group + 1), size
            return
        whole = is_wide(self.reading.encoding) or (file.kind == "text" and self.reading.documents == "file")
        pieces = 1 if whole else max(1, round(file.size / target))
        for piece in range(pieces):
            start, end = file.size * piece // pieces, file.size * (piece + 1) // pieces
            yield Part(file.path, file.kind, file.size, start, END if whole else end), end - start

    def identity(self) -> dict[str, Any]:
        """Return what the tokens depend on: how the files are read, and name, size and checksum of each.

        Of a file of more than 64 MB the checksum is that of 64 blocks.
        """
        files = [[file.name, file.size, sample(Path(file.path), WHOLE, BLOCKS)] for file in self.files]
        reading = self.reading
        return {
            "files": files,
            "column": reading.column,
            "split": reading.documents,
            "encoding": reading.encoding,
        }


def open_corpus(
    paths: Any,
    *,
    column: str | None = None,
    documents: str = "auto",
    encoding: str = "utf-8",
    name: str = "train",
) -> Corpus:
    """Return the corpus of text files, JSON lines, Parquet files, or folders of these.

    Args:
        paths: a file, a folder (searched recursively, in sorted order), or a list of these.
        column: the column with the text in JSON lines and Parquet; default `text`.
        documents: how text files are split: 'paragraphs' (separated by blank lines), 'lines', 'file' (each file is one
            document), or 'auto': 'file' if there are ten or more files, none larger than 1 MB, else 'paragraphs' if there are
            blank lines in their beginnings, else 'lines'.
        encoding: of text files and JSON lines. Bytes that cannot be decoded are left out and counted.
        name: what messages call the corpus.

    Raises UserError for files that are missing, empty, binary, in an unknown format or without the column.
    """
    if documents not in DOCUMENTS:
        raise UserError(
            f"documents={documents!r} is none of {listing(DOCUMENTS)}.{nearest(str(documents), DOCUMENTS)}"
        )
    try:
        codecs.lookup(encoding)
        b"".decode(encoding)
    except (LookupError, ValueError):
        raise UserError(
            f"encoding={encoding!r} is not a known text encoding (such as {listing(ENCODINGS)}).{nearest(encoding, ENCODINGS)}"
        ) from None
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths or ())
    if not given:
        raise UserError(
            f"{name}: no file is named. Name text files, JSON lines, Parquet files or folders of these."
        )
    files = [file for path in given for file in _found(os.fspath(path))]
    _refuse_twice(files)
    filled = [file for file in files if file.size]
    if not filled:
        raise UserError(
            f"{name}: the corpus is empty: {listing((file.path for file in files), 4)} has no text. Name others."
        )
    heads = {file: _head(file) for file in filled}
    reading = Reading(column or "text", _how(heads, documents), encoding)
    for file in filled:
        _check(file, heads[file], reading)
    return Corpus(name, tuple(filled), reading)


def _found(given: str) -> Iterator[File]:
    """Yield the files of a path."""
    path = Path(given).expanduser()
    if not path.is_dir():
        with telling_why(path, given), path.open("rb"):
            pass
        if (kind := SUFFIXES.get(path.suffix.lower())) is None:
            ending = f"the ending '{path.suffix}'" if path.suffix else "no ending"
            raise UserError(
                f"{given} has {ending}, and a corpus is of {listing(SUFFIXES)}. Rename or convert it."
            )
        yield File(path.name, str(path), kind, path.stat().st_size)
        return
    inside = sorted(
        (
            found
            for found in path.rglob("*")
            if found.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in found.relative_to(path).parts)
            and not found.is_dir()
        ),
        key=lambda found: found.relative_to(path).as_posix(),
    )
    if not inside:
        raise UserError(
            f"{given} has no file with one of the endings of a corpus ({listing(SUFFIXES)}). Name another folder."
        )
    for found in inside:
        if (wrong := irregular(found)) is not None:
            raise UserError(f"{found} {wrong}.")
        kind = SUFFIXES[found.suffix.lower()]
        yield File(found.relative_to(path).as_posix(), str(found), kind, found.stat().st_size)


def _refuse_twice(files: Sequence[File]) -> None:
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file.path)
        if real in seen:
            raise UserError(f"{file.path} is named twice, so that its documents would be. Name it once.")
        seen.add(real)


def _head(file: File) -> bytes:
    with telling_why(Path(file.path), file.path), open(file.path, "rb") as opened:
        head = opened.read(HEAD)
    if head.startswith(POINTER):
        raise UserError(f"{file.path} {fault(Path(file.path))}.")
    return head


def _how(heads: dict[File, bytes], documents: str) -> str:
    """Return how text files are split into documents."""
    if documents != "auto":
        return documents
    texts = {file: head for file, head in heads.items() if file.kind == "text"}
    if len(texts) >= ARTICLES and all(file.size <= ARTICLE for file in texts):
        return "file"
    for head in texts.values():
        lines = [not line.strip() for line in head.strip().split(b"\n")]
        if any(lines):
            return "paragraphs"
    return "lines"


def _check(file: File, head: bytes, reading: Reading) -> None:
    """Raise `UserError` for a file whose beginning cannot be that of a corpus."""
    if file.kind == "parquet":
        _check_columns(file.path, reading.column)
        return
    _check_text(file.path, head, reading.encoding)
    if file.kind == "text" and reading.documents == "file" and file.size > LONGEST:
        raise UserError(
            f"{file.path} is one document of {file.size:,} bytes, and at most {LONGEST:,} are read. Split it with "
            "documents='paragraphs' or documents='lines'."
        )
    first, end, _ = head.lstrip().partition(b"\n")
    if file.kind == "json lines" and (end or len(head) == file.size) and first:
        try:
            row = parse_json(first.decode(reading.encoding, "replace").lstrip("\ufeff"), halves=True)
        except (ValueError, RecursionError):
            return  # told with the line when it is read
        text_of(row, reading.column, lambda: f"{file.path}, line 1")


def _check_text(path: str, head: bytes, encoding: str) -> None:
    """Raise `UserError` for a binary file, and for text that is clearly of another encoding."""
    utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
    if utf8:
        refuse_wide_characters(head, path, encoding)
    text = head.decode(encoding, "replace")
    control = sum(character < " " and character not in "\t\n\r\f\x1b" for character in text)
    if control > FEW and control * 50 > len(text):
        raise UserError(
            f"{path} is a binary file: {control:,} of its first {len(text):,} characters are control characters. Give a text "
            "file."
        )
    wrong = text.count("\ufffd")
    others = sum(character > "\x7f" for character in text) - wrong
    if wrong > FEW and wrong > others:
        raise UserError(
            f"{path} is not {encoding}: {wrong:,} of its first {len(text):,} characters cannot be decoded. "
            f"{suggest_encoding(head, utf8)}."
        )


def _check_columns(path: str, column: str) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        with telling_why(Path(path), path):
            schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise broken(path, "parquet", error) from None
    if column not in schema.names:
        raise UserError(missing(path, column, schema.names))
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column '{column}' holds {kind}, not texts. Name another column.")


def _group_sizes(path: str) -> list[int]:
    """Return the bytes of each row group of a Parquet file."""
    import pyarrow.parquet

    about = pyarrow.parquet.read_metadata(path)
    return [about.row_group(group).total_byte_size for group in range(about.num_row_groups)]
