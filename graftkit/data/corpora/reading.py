"""Read a part of a corpus' files as a stream of documents.

A part is a range of bytes of a text file, or of row groups of a Parquet file. A document belongs to the part in which it
begins, so that the parts of a file can be read on their own, and have together each document once.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from graftkit.data.corpora.cleaning import Counts, clean
from graftkit.data.json_text import parse_json
from graftkit.data.read import broken, telling_why
from graftkit.data.unpacked import open_parquet, refuse_inflated, text_bytes
from graftkit.errors import UserError, listing, nearest, shown

LONGEST = 10_000_000  # bytes of a document; a long book has five million
END = 2**62  # of a file that is not divided
ROWS = 256  # of a Parquet file that are in memory together
WIDE = ("utf-16", "utf-32", "utf-7")  # encodings in which the byte 10 may be anything but the end of a line


@dataclass(frozen=True)
class Part:
    """Bytes, or row groups, `start` to `end` of a file of `size` bytes."""

    path: str
    kind: str  # 'text', 'json lines' or 'parquet'
    size: int
    start: int = 0
    end: int = END

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reading:
    """How the files of a corpus are read."""

    column: str
    documents: str  # of text files: 'paragraphs', 'lines' or 'file'
    encoding: str

    def read(self, part: Part, counts: Counts) -> Iterator[str]:
        """Yield the cleaned text of each document of a part that is not empty."""
        if Path(part.path).stat().st_size != part.size:
            raise UserError(
                f"{part.path} has changed while it was being read. Start again when it is complete."
            )
        with telling_why(Path(part.path), part.path):
            for text in self._texts(part):
                text = clean(text, counts)
                counts.empty += not text
                if text:
                    yield text

    def _texts(self, part: Part) -> Iterator[str]:
        if part.kind == "parquet":
            yield from _parquet(part, self.column)
        elif part.kind == "json lines":
            for offset, line in self._lines(part):
                if offset >= part.end:
                    return
                if not line.isspace():
                    yield self._value(part, offset, line)
        elif self.documents == "lines":
            for offset, line in self._lines(part):
                if offset >= part.end:
                    return
                if not line.isspace():
                    yield self._decode(line)
        else:
            yield from self._paragraphs(part)

    def _paragraphs(self, part: Part) -> Iterator[str]:
        """Yield the documents that blank lines separate. One belongs to the part in which the blank line before it begins;
        the first of the file belongs to the first part.
        """
        whole = self.documents == "file"
        inside, size, lines = part.start == 0, 0, list[bytes]()
        for offset, line in self._lines(part):
            if whole or not line.isspace():
                if inside:
                    lines.append(line)
                    size += len(line)
                    if size > LONGEST:
                        raise too_long(part, self._number(part, offset))
                continue
            if lines:
                yield self._decode(b"".join(lines))
            if offset >= part.end:
                return
            inside, size, lines = True, 0, []
        if lines:
            yield self._decode(b"".join(lines))

    def _lines(self, part: Part) -> Iterator[tuple[int, bytes]]:
        """Yield place and bytes of each line that begins at `part.start` or after it, to the end of the file.

        Lines of an encoding in which they cannot be told by their bytes come as UTF-8.
        """
        with open(part.path, "rb") as file:
            offset = 0
            readline: Callable[[int], bytes] = file.readline
            if is_wide(self.encoding):
                text = io.TextIOWrapper(file, self.encoding, "replace", newline="\n")
                readline = partial(_recoded, text)
            elif part.start:
                file.seek(part.start - 1)
                offset = part.start - 1 + _skip_line(file)
            while line := readline(LONGEST + 1):
                if len(line) > LONGEST:
                    raise too_long(part, self._number(part, offset))
                yield offset, line
                offset += len(line)

    def _decode(self, raw: bytes) -> str:
        return raw.decode("utf-8" if is_wide(self.encoding) else self.encoding, "replace")

    def _value(self, part: Part, offset: int, line: bytes) -> str:
        """Return the text of a line of JSON."""
        try:
            row = parse_json(self._decode(line).lstrip("\ufeff"), halves=True)
        except (ValueError, RecursionError) as error:
            said = str(error).partition(":")[0]
            raise UserError(
                f"{part.path}, line {self._number(part, offset)}: not JSON: {said}. Write one object on each line."
            ) from None
        text = text_of(row, self.column, lambda: f"{part.path}, line {self._number(part, offset)}")
        return text

    def _number(self, part: Part, offset: int) -> str:
        """Return the number of the line that begins at a place of a file, for a message."""
        if is_wide(self.encoding):
            return "?"
        number, left = 1, offset
        with open(part.path, "rb") as file:
            while left and (block := file.read(min(left, 1 << 20))):
                number, left = number + block.count(b"\n"), left - len(block)
        return f"{number:,}"


def text_of(row: Any, column: str, where: Any) -> str:
    """Return the text of a row of JSON; an empty one for null. Raises UserError for a row without that column."""
    if not isinstance(row, dict):
        raise UserError(
            f"{where()}: {shown(row, 40)} is not an object with named values. Write one object on each line."
        )
    if column not in row:
        raise UserError(missing(f"{where()}: the row", column, list(row)))
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{where()}: column '{column}' is {shown(value, 40)}, not a text. Name another column."
        )
    return value or ""


def missing(where: str, column: str, columns: list[str]) -> str:
    """Return the message for a column that is not there."""
    return (
        f"{where} has no column '{column}' (columns: {listing(columns)}). Name the column with the text."
        f"{nearest(column, columns)}"
    )


def too_long(part: Part, number: str) -> UserError:
    return UserError(
        f"{part.path}, line {number}: a document of more than {LONGEST:,} bytes. Split it: into lines "
        "(documents='lines') or paragraphs (documents='paragraphs'), with line breaks where there are none."
    )


def is_wide(encoding: str) -> bool:
    return codecs.lookup(encoding).name.startswith(WIDE)


def _recoded(text: io.TextIOWrapper, size: int) -> bytes:
    """Return a line as UTF-8."""
    return text.readline(size).encode("utf-8", "surrogatepass")


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of a line, however long it is; return the bytes."""
    passed = 0
    while block := file.readline(1 << 20):
        passed += len(block)
        if block.endswith(b"\n"):
            break
    return passed


def _parquet(part: Part, column: str) -> Iterator[str]:
    import pyarrow

    try:
        with open(part.path, "rb") as raw:
            file = open_parquet(raw, part.size, part.path)
            groups = list(range(part.start, min(part.end, file.num_row_groups)))
            for batch in file.iter_batches(ROWS, groups, [column]):
                values = batch.column(0)
                refuse_inflated(text_bytes(values), 0, part.size, part.path)
                if pyarrow.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                for value in values.cast(pyarrow.large_binary()).to_pylist():
                    if value is not None and len(value) > LONGEST:
                        raise UserError(
                            f"{part.path}, row group {part.start}: a document of {len(value):,} bytes, and at most "
                            f"{LONGEST:,} are read. Split it into several rows."
                        )
                    yield (value or b"").decode("utf-8", "replace")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise broken(part.path, "parquet", error) from None
