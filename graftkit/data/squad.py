"""Read extractive question answering data: SQuAD's nested JSON, and flat tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.data.encoding import decode
from graftkit.data.json_text import parse_json
from graftkit.data.read import Table
from graftkit.errors import UserError, listing

NEAR = 64  # maximum characters between answer_start and where the answer is found
FIELDS = ("id", "title", "question", "context", "answers", "is_impossible")
KINDS = {list: "a list", dict: "an object", str: "a string", type(None): "missing or null", bool: "a boolean"}


@dataclass(frozen=True)
class Gold:
    """The gold answers of one question, each with its start in the context, in characters; empty if it is unanswerable.

    `moved`: number of answers whose answer_start was wrong and has been corrected.
    """

    answers: tuple[tuple[str, int], ...] = ()
    moved: int = 0


def nested(source: Any, encoding: str) -> Any | None:
    """Return the content of a JSON file (or an object in memory) in SQuAD's nested format; None for anything else."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.suffix.lower() != ".json" or not path.is_file():
            return None
        try:
            source = parse_json(decode(path.read_bytes(), str(source), encoding))
        except (ValueError, RecursionError, OSError):
            return None  # JSON lines, or an error that is reported when it is read as a table
    if not isinstance(source, Mapping) or {"question", "context"} & set(source):
        return None
    return source if {"data", "paragraphs"} & set(source) else None


def squad_table(whole: Any, source: str, skip_bad: bool) -> Table:
    """Return the questions of SQuAD's JSON, 1.1 or 2.0, as rows: {data: [{title, paragraphs: [{context, qas: [...]}]}]}.

    `data` may also be flat: [{id, title, question, context, answers}]. Raises `UserError` with the path of
    anything malformed; with `skip_bad`, malformed questions are skipped instead.
    """
    walk = _Walk(source, skip_bad)
    if "data" in whole:
        for number, article in enumerate(walk.expect(whole["data"], list, "data")):
            walk.article(walk.expect(article, dict, f"data[{number}]"), f"data[{number}].")
    else:
        walk.article(whole, "")
    if not walk.rows:
        first = f": {walk.skipped[0]}" if walk.skipped else "."
        raise UserError(f"{source} has no {'good ' if walk.skipped else ''}questions{first}")
    used = [name for name in FIELDS if any(name in row for row in walk.rows)]
    columns = {name: [row.get(name) for row in walk.rows] for name in used}
    return Table(columns, source, walk.numbers, "question", tuple(walk.skipped))


class _Walk:
    """Walk through a file and collect its questions."""

    def __init__(self, source: str, skip_bad: bool) -> None:
        self.source, self.skip_bad = source, skip_bad
        self.rows: list[dict[str, Any]] = []
        self.numbers: list[int] = []
        self.skipped: list[str] = []
        self.seen = 0

    def expect(self, value: Any, kind: type, path: str) -> Any:
        if isinstance(value, kind):
            return value
        found = KINDS.get(type(value), "a number")
        raise UserError(
            f"{self.source}: {path} is {found}, but must be {KINDS[kind]} in SQuAD's format "
            "({data: [{title, paragraphs: [{context, qas: [{id, question, answers: [{text, answer_start}]}]}]}]})."
        )

    def article(self, article: Mapping, path: str) -> None:
        if "paragraphs" not in article and "question" in article and "context" in article:
            self.question(article, {}, path.removesuffix("."))  # a flat list of questions
            return
        about = {"title": article["title"]} if isinstance(article.get("title"), str) else {}
        for number, paragraph in enumerate(self.expect(article.get("paragraphs"), list, f"{path}paragraphs")):
            here = f"{path}paragraphs[{number}]"
            self.expect(paragraph, dict, here)
            context = self.expect(paragraph.get("context"), str, f"{here}.context")
            for place, qa in enumerate(self.expect(paragraph.get("qas"), list, f"{here}.qas")):
                self.question(qa, {**about, "context": context}, f"{here}.qas[{place}]")

    def question(self, qa: Any, about: dict[str, Any], path: str) -> None:
        self.seen += 1
        try:
            self.expect(qa, dict, path)
            self.expect(qa.get("question"), str, f"{path}.question")
            if "answers" in qa and not isinstance(qa["answers"], dict):
                for number, answer in enumerate(self.expect(qa["answers"], list, f"{path}.answers")):
                    self.expect(answer, dict, f"{path}.answers[{number}]")
                    self.expect(answer.get("text"), str, f"{path}.answers[{number}].text")
        except UserError as error:
            if not self.skip_bad:
                raise
            self.skipped.append(str(error))
            return
        self.rows.append({**about, **{name: qa[name] for name in FIELDS if name in qa}})
        self.numbers.append(self.seen)


def read_answers(value: Any, start: Any, impossible: bool | None) -> list[tuple[str, int | None]]:
    """Return the answers of one row, each with its start, or None if the start is not given.

    `value`: {text: [...], answer_start: [...]}, a list of {text, answer_start}, a list of texts, or one text, for which
    `start` comes from a column of its own. Raises `ValueError` with what is wrong.
    """
    value, start = _plain(value), _plain(start)
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # a cell of a CSV file
        try:
            read = parse_json(value)
        except ValueError:
            read = value
        value = read if isinstance(read, list | dict) else value
    if isinstance(value, Mapping):
        if "text" not in value:
            raise ValueError(f"answers has no 'text' (it has: {listing(value)})")
        value, start = _plain(value["text"]), _plain(value.get("answer_start"))
    if impossible and (value is None or value == ""):
        value = []
    if value is None or value == "":
        raise ValueError("has no answer; for an unanswerable question, write an empty list [] of answers")
    texts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if texts and all(isinstance(text, Mapping) for text in texts):
        found = [(text.get("text"), text.get("answer_start")) for text in texts]
    else:
        starts = list(start) if isinstance(start, list | tuple) else [start] * len(texts)
        if len(starts) != len(texts):
            raise ValueError(f"has {len(texts)} answers but {len(starts)} of answer_start")
        found = list(zip(texts, starts))
    if impossible and found:
        raise ValueError("is_impossible is true, but there are answers; remove one or the other")
    return [(_text(text), _start(begin)) for text, begin in found]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"an answer is {KINDS.get(type(value), 'a ' + type(value).__name__)}, not a text")
    if not str(value).strip():
        raise ValueError(
            "an answer is empty; for an unanswerable question, write an empty list [] of answers"
        )
    return str(value)


def _start(value: Any) -> int | None:
    value = _plain(value)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.5
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError(f"answer_start is {value!r}, not a whole number of characters")
    return int(number)


def locate(context: str, text: str, start: int | None) -> tuple[str, int, bool]:
    """Find an answer in the context, ignoring surrounding whitespace. Return its text, its start, and whether the start
    differs from the given one.

    Raises `ValueError` if the context does not contain the answer, or contains it several times.
    """
    lead = len(text) - len(text.lstrip())
    text, start = text.strip(), None if start is None else start + lead
    if start is not None and start >= 0 and context.startswith(text, start):
        return text, start, False
    places = _places(context, text)
    near = [place for place in places if start is not None and abs(place - start) <= NEAR]
    if len(near) == 1 or len(places) == 1:
        return text, (near if len(near) == 1 else places)[0], start is not None
    given = ""
    if start is not None:
        there = context[max(start, 0) : max(start, 0) + len(text)]
        found = f"the text there is {_short(there)!r}" if there else "which is past its end"
        given = f" (answer_start is {start - lead}; {found})"
    if places:
        raise ValueError(
            f"the answer {_short(text)!r} occurs {len(places)} times in the context, at {listing(map(str, places), 6)}"
            f"{given}; choose one with answer_start"
        )
    other = context.casefold().find(text.casefold())
    hint = f"; the context has {context[other : other + len(text)]!r} at {other}" if other >= 0 else ""
    raise ValueError(f"the answer {_short(text)!r} is not in the context{given}{hint}")


def _places(context: str, text: str) -> list[int]:
    found, at = [], context.find(text)
    while at >= 0:
        found.append(at)
        at = context.find(text, at + 1)
    return found


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
