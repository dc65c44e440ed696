"""Read CoNLL files as tables: one token per line with its columns, and a blank line after each sentence."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from graftkit.data.encoding import decode_blocks
from graftkit.data.read import telling_why
from graftkit.data.rows import split_lines
from graftkit.data.table import BadRows, Table
from graftkit.errors import UserError

SUFFIXES = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".bioes", ".txt")
TOKENS, TAGS = "tokens", "tags"
SPACE = " \t\r"
DOCUMENT = "-DOCSTART-"
UNIVERSAL = (2, 4)  # columns of the word and its universal part of speech in CoNLL-U
HEAD, BLOCK = 100_000, 1 << 20  # lines from which the layout is inferred; bytes read at once
TEXTS = '; for whole texts use a file of JSON lines, {"text": ...}'

Line = tuple[int, str]


@dataclass(frozen=True)
class Layout:
    """The layout of a file: `width` columns, separated by tabs or spaces; `token` and `tag` are indices from 0.

    `known`: the distinct values of the last column. `universal`: the file is CoNLL-U.
    """

    tabs: bool
    width: int
    token: int
    tag: int
    known: frozenset[str]
    universal: bool

    def is_comment(self, line: str) -> bool:
        """Return whether a line that starts with '#' is a comment; a hashtag, or '#' itself, can be a token."""
        fields = _fields(line, self.tabs)
        if len(fields) == self.width and fields[-1] in self.known:
            return False
        return self.universal or line[1:2] in ("", " ", "\t", "#") or "=" in line

    def problem(self, fields: list[str]) -> str | None:
        """Return what is wrong with the fields of a line, or None."""
        if len(fields) != self.width:
            apart = "tabs" if self.tabs else "spaces"
            columns = "1 column" if len(fields) == 1 else f"{len(fields)} columns"
            return f"{columns}, but the other lines have {self.width} (separated by {apart})"
        for name, place in (("token", self.token), ("tag", self.tag)):
            if not fields[place]:
                return f"there is no {name} in column {place + 1}"
        return None


def read_conll(
    source: str, *, encoding: str = "utf-8", skip_bad: bool = False, token_column: int = 1, tag_column: int = -1
) -> Table:  # fmt: skip
    """Read each sentence of a file as a row with the columns `tokens` and `tags`, lists of the same length.

    Columns are separated by tabs, or by spaces if most lines have no tab. `token_column` and `tag_column` count from 1, or
    from -1 backwards; in `.conllu` files they default to the word and its universal part of speech. A file with one column
    contains only tokens. -DOCSTART- lines and comments are skipped; a line that starts with '#' is a token if its tag occurs
    on other lines. The number of a row is the first line of its sentence.

    Raises `UserError` for a file that cannot be read or has no sentence, and for the first malformed line. With `skip_bad`,
    sentences with malformed lines are skipped and counted instead.
    """
    return next(conll_pieces(source, encoding, skip_bad, (token_column, tag_column), None))


def conll_pieces(
    source: str, encoding: str, skip_bad: bool, places: tuple[int, int], rows: int | None
) -> Iterator[Table]:
    """Yield what `read_conll` returns as tables of at most `rows` rows, one in memory at a time; None for a single table.

    `places`: token_column and tag_column.
    """
    path = Path(source).expanduser() if source.startswith("~") else Path(source)
    numbered = enumerate(split_lines(decode_blocks(_blocks(path, source), source, encoding), "\n"), start=1)
    lines = ((number, line.rstrip(SPACE)) for number, line in numbered)
    head = list(itertools.islice(lines, HEAD))
    layout = _layout(head, source, path, places)
    bad = BadRows(source, "line", skip_bad)
    hint = TEXTS if path.suffix.lower() == ".txt" else ""
    good = _good(_sentences(itertools.chain(head, lines), layout), layout, bad, hint)
    begun = False
    while (piece := list(itertools.islice(good, rows))) or not begun or bad.messages:
        columns: dict[str, list] = {
            TOKENS: [[fields[layout.token] for _, fields in found] for found in piece]
        }
        if layout.token != layout.tag:
            columns[TAGS] = [[fields[layout.tag] for _, fields in found] for found in piece]
        numbers = [found[0][0] for found in piece]
        if begun and not piece:
            yield Table(columns, source, numbers, bad.unit, tuple(bad.messages))
        else:
            yield bad.table(columns, numbers)
        begun, bad.messages = True, []


def _blocks(path: Path, source: str) -> Iterator[bytes]:
    with telling_why(path, source), path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _layout(head: list[Line], source: str, path: Path, places: tuple[int, int]) -> Layout:
    found = [line for _, line in head if not _ends(line) and not line.startswith("#")]
    if not found:
        raise UserError(f"{source} has no sentences. Write one token and its tag per line")
    tabs = sum("\t" in line for line in found) * 2 > len(found)
    width = Counter(len(_fields(line, tabs)) for line in found).most_common(1)[0][0]
    universal = path.suffix.lower() == ".conllu"
    token, tag = UNIVERSAL if universal and places == (1, -1) else places
    for name, place in (("token_column", token), ("tag_column", tag)):
        if place == 0 or abs(place) > width:
            raise UserError(
                f"{source} has {width} columns, so {name}={place} does not exist (the first is 1, the last {width} or -1)"
            )
    token, tag = (place - 1 if place > 0 else width + place for place in (token, tag))
    if token == tag and width > 1:
        raise UserError(
            f"{source}: token_column and tag_column are both column {token + 1} of {width}; choose two different columns"
        )
    known = frozenset(_fields(line, tabs)[-1] for line in found)
    return Layout(tabs, width, token, tag, known, universal)


def _ends(line: str) -> bool:
    """Return whether a line ends a sentence. The last one may contain only a byte-order mark."""
    return not line.strip(SPACE + "\ufeff") or line.startswith(DOCUMENT)


def _fields(line: str, tabs: bool) -> list[str]:
    if tabs:
        return [field.strip(SPACE) for field in line.split("\t")]
    return [field for field in line.replace("\t", " ").split(" ") if field]


def _sentences(lines: Iterable[Line], layout: Layout) -> Iterator[list[Line]]:
    sentence: list[Line] = []
    for number, line in lines:
        if line.startswith("#") and layout.is_comment(line):
            continue
        if not _ends(line):
            sentence.append((number, line))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _good(
    sentences: Iterable[list[Line]], layout: Layout, bad: BadRows, hint: str
) -> Iterator[list[tuple[int, list[str]]]]:
    """Yield the line numbers and fields of each sentence without a malformed line."""
    for sentence in sentences:
        split = [(number, _fields(line, layout.tabs)) for number, line in sentence]
        if layout.universal:  # skip lines of contractions (1-2) and of elided words (1.1)
            split = [(number, fields) for number, fields in split if not re.search("[-.]", fields[0])]
        problems = ((number, layout.problem(fields)) for number, fields in split)
        number, problem = next((found for found in problems if found[1] is not None), (0, None))
        if problem is not None:
            bad.add(number, problem + hint)
        elif split:
            yield split
