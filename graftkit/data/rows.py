"""Parse the rows of text files lazily from their lines, so that whole files and pieces share one code path."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from graftkit.data.json_text import parse_json
from graftkit.data.table import LONGEST, BadRows, check_names
from graftkit.errors import UserError, listing

Fields = tuple[int, int, list[str]]  # first line, last line and fields of a record


def csv_lines(blocks: Iterable[str]) -> Iterator[str]:
    """Yield lines with their line endings: `\\n`, `\\r\\n` or `\\r`."""
    rest: list[str] = []  # parts of a line
    for block in blocks:
        rest.append(block)
        if "\n" not in block and "\r" not in block:
            continue
        lines = list(io.StringIO("".join(rest), newline=""))
        rest = [lines.pop()] if lines and not lines[-1].endswith("\n") else []  # \n may follow \r
        yield from lines
    if last := "".join(rest):
        yield last


def split_lines(blocks: Iterable[str], end: str) -> Iterator[str]:
    """Yield the parts of `text.split(end)` for a text given in blocks."""
    rest: list[str] = []  # parts of a line
    for block in blocks:
        first, *more = block.split(end)
        rest.append(first)
        if more:
            yield "".join(rest)
            yield from more[:-1]
            rest = [more[-1]]
    yield "".join(rest)


def fields_of(kind: str, head: str, blocks: Iterable[str], bad: BadRows) -> tuple[Iterator[Fields], str]:
    """Return the records of a CSV or TSV file, including the header, and how to fix one with too many fields.

    `head`: the beginning of the text, with at least its first line.
    """
    if kind == "tsv":
        return tsv_records(split_lines(blocks, "\n" if "\n" in head else "\r")), "a text cannot contain a tab"
    first = next(line for line in head.splitlines() if line.strip())
    delimiter = next((mark for mark in ",;\t" if mark in first), ",")
    records = csv_records(_Lines(csv_lines(blocks)), delimiter, bad)
    return records, f"put a text that contains '{delimiter}' in double quotes"


class _Lines:
    """A stream of lines that can be rewound as far back as `forget` allows."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.coming = lines
        self.kept: list[str] = []
        self.first = 0  # index of the first line in `kept`

    def after(self, index: int) -> Iterator[str]:
        """Yield the lines starting at an index."""
        while True:
            if index - self.first == len(self.kept):
                line = next(self.coming, None)
                if line is None:
                    return
                self.kept.append(line)
            yield self.kept[index - self.first]
            index += 1

    def between(self, start: int, end: int) -> list[str]:
        return self.kept[start - self.first : end - self.first]

    def forget(self, before: int) -> None:
        """Free lines before this index; they are not needed again."""
        done = before - self.first
        if done > 64 and done * 2 > len(self.kept):
            del self.kept[:done]
            self.first = before


def csv_records(lines: _Lines, delimiter: str, bad: BadRows) -> Iterator[Fields]:
    """Yield the first line, last line and fields of each record.

    After an unbalanced quote, parsing restarts on the next line, so that the quote costs one row and not all rows up to the
    next quote.
    """
    first, seen = 0, False
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        while True:
            reader, start = csv.reader(lines.after(first), delimiter=delimiter, strict=True), first
            try:
                for record in reader:
                    end = first + reader.line_num
                    if "".join(lines.between(start, end)).strip():
                        yield start + 1, end, record
                        seen = True
                    start = end
                    lines.forget(start)
                return
            except csv.Error as error:
                end = first + reader.line_num
                opened = start + _opening_quote(lines.between(start, end), delimiter)
                problem = (
                    "the double quote opened here is not closed at the end of a field "
                    f"(line {end}: {error}). Double each quote inside a quoted text"
                )
                if not seen:
                    raise UserError(f"{bad.source}, line {opened + 1}: {problem}") from None
                bad.add(opened + 1, problem)
                first = opened + 1
    finally:
        csv.field_size_limit(limit)


def _opening_quote(lines: list[str], delimiter: str) -> int:
    """Return the index of the line on which the first malformed field starts."""
    text, at, line = "".join(lines), 0, 0
    ends = re.escape(delimiter)
    whole = re.compile(rf'(?:"(?:[^"]|"")*+"|(?!")[^{ends}\r\n]*)(?:{ends}|\r\n|\r|\n|\Z)')
    while (found := whole.match(text, at)) and found.end() > at:
        at = found.end()
    while line < len(lines) - 1 and at >= len(lines[line]):
        at -= len(lines[line])
        line += 1
    return line


def tsv_records(lines: Iterable[str]) -> Iterator[Fields]:
    for number, line in enumerate(lines, start=1):
        if line.strip("\r") and not line.isspace():
            yield number, number, [_unquote(value) for value in line.removesuffix("\r").split("\t")]


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"' or '"' in value[1:-1].replace('""', ""):
        return value
    return value[1:-1].replace('""', '"')


def read_header(records: Iterator[Fields], bad: BadRows) -> list[str]:
    line, _, header = next(records)
    header = [name.strip() for name in header]
    check_names(header, f"{bad.source}, line {line} (the header)")
    return header


def good_fields(
    records: Iterator[Fields], header: list[str], remedy: str, bad: BadRows
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and fields of each record with as many fields as the header."""
    for start, end, fields in records:
        if (size := max(map(len, fields), default=0)) > LONGEST:
            bad.add(start, too_long(size))
            continue
        if len(fields) == len(header):
            yield start, fields
            continue
        count = f"{len(fields)} field{'' if len(fields) == 1 else 's'}"
        problem = f"{count} where the header has {len(header)} (columns: {listing(header)})"
        if end > start:
            problem += f"; a double quote makes lines {start} to {end} one row"
        elif len(fields) > len(header):
            problem += f"; {remedy}"
        bad.add(start, problem)


def too_long(size: int) -> str:
    return f"a value has {size:,} characters, and at most {LONGEST:,} are read"


def by_column(header: list[str], rows: list[list[str]]) -> dict[str, list[Any]]:
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def json_line_records(lines: Iterable[str], bad: BadRows) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the line number and object of each line that contains a JSON object."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except json.JSONDecodeError as error:
            bad.add(number, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            bad.add(number, f"not JSON that can be parsed: {error}")
        else:
            yield from good_records([(number, record)], bad, "\\ud" in line.lower())


def good_records(
    records: Iterable[tuple[int, Any]], bad: BadRows, check_text: bool = False
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the records that are JSON objects and, if `check_text`, contain no unpaired surrogates."""
    for number, record in records:
        if not isinstance(record, Mapping):
            bad.add(number, f"expected an object with named values, not a {json_kind(record)}")
        elif (size := max((len(v) for v in record.values() if isinstance(v, str)), default=0)) > LONGEST:
            bad.add(number, too_long(size))
        elif check_text and re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False)):
            bad.add(number, "unpaired surrogate (\\ud800 to \\udfff), which is not a character")
        else:
            yield number, record


def json_kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number" if isinstance(value, (int, float)) else type(value).__name__)
