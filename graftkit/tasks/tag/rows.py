"""Read sentences with a tag for each word from the cells of a table, in any of the supported forms."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.data.json_text import parse_json
from graftkit.data.read import Table
from graftkit.errors import listing, nearest
from graftkit.tasks.shared.items import is_nothing
from graftkit.tasks.shared.labels import LabelIndex, label_text
from graftkit.tasks.tag.entities import are_of_entities, bio, chunks, parse_tag, types_of
from graftkit.tasks.tag.words import text_of

START, END = ("start", "begin", "start_offset"), ("end", "stop", "end_offset")
KIND = ("label", "type", "entity", "entity_group", "tag")


class Unfit(ValueError):
    """What is wrong with a row, without its position."""


@dataclass(frozen=True)
class Sentence:
    """A text or its tokens as given, and a tag for each word, in the original scheme; spans become BIO tags. `widened`:
    number of spans that started or ended within a word."""

    value: str | list[str]
    tags: tuple[str, ...] = ()
    widened: int = 0


def read_sentence(value: Any, tags: Any = None, tagged: bool = False) -> Sentence:
    """Read one row. `tagged`: it must have tags, or character spans. Raises `Unfit`."""
    value = _read_value(value)
    if not tagged:
        return Sentence(value)
    tags = _listed(tags)
    if tags is None:
        raise Unfit("it has no tags")
    if any(isinstance(tag, dict | list | tuple) for tag in tags) or (not tags and isinstance(value, str)):
        if not isinstance(value, str):
            raise Unfit(
                "its entities are character spans, but it is a list of tokens; give the text, or a tag for each token"
            )
        found, widened = _words_of_spans(value, tags)
        return Sentence(value, found, widened)
    tokens = value.split() if isinstance(value, str) else value
    if len(tokens) != len(tags):
        raise Unfit(f"{_count(len(tags), 'tag')} for {_count(len(tokens), 'token')}")
    names = []
    for place, (token, tag) in enumerate(zip(tokens, tags), start=1):
        if tag is None or not label_text(tag):
            raise Unfit(f"token {place} ({token!r}) has no tag")
        names.append(label_text(tag))
    return Sentence(tokens, tuple(names))


def _read_value(value: Any) -> str | list[str]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value) or value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        if not value.strip():
            raise Unfit("the text is empty")
        return value
    if not isinstance(value, list | tuple):
        raise Unfit(
            "there is no text"
            if value is None
            else f"a {type(value).__name__}, where a text or a list of tokens should be"
        )
    if not value:
        raise Unfit("the list of tokens is empty")
    for place, token in enumerate(value, start=1):
        if (
            is_nothing(token)
            or not isinstance(token, str | int | float)
            or isinstance(token, bool)
            or token == ""
        ):
            raise Unfit(f"token {place} of {len(value)} is {token!r}, not a non-empty text")
    return [str(token) for token in value]


def _listed(tags: Any) -> list[Any] | None:
    """Read a cell of tags; in a CSV file these are separated by spaces, or JSON."""
    if isinstance(tags, str):
        return _from_json(tags) if tags.lstrip().startswith("[") else tags.split() or None
    if hasattr(tags, "tolist"):
        tags = tags.tolist()
    if tags is None or tags != tags:  # nan
        return None
    if not isinstance(tags, list | tuple):
        raise Unfit(f"its tags are a {type(tags).__name__}, where a list should be")
    return list(tags)


def _from_json(text: str) -> list[Any] | None:
    try:
        found = parse_json(text)
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def _words_of_spans(text: str, entities: Sequence[Any]) -> tuple[tuple[str, ...], int]:
    """Return BIO tags of the words that overlap with character spans, and how many spans were widened to whole words."""
    words = text_of(text)[1]
    begins, ends = [begin for begin, _ in words], [end for _, end in words]
    spans = sorted(
        (_span(text, entity, n) for n, entity in enumerate(entities, start=1)), key=lambda s: s[:2]
    )
    found, widened, taken = [], 0, -1
    for n, (start, end, kind) in enumerate(spans):
        if n and spans[n - 1][1] > start:
            raise Unfit(f"{_shown(text, spans[n - 1])} and {_shown(text, spans[n])} overlap")
        touched = range(bisect_right(ends, start), bisect_left(begins, end))
        if not touched:
            raise Unfit(f"{_shown(text, spans[n])} has no word in it")
        if touched[0] <= taken:
            raise Unfit(
                f"{_shown(text, spans[n - 1])} and {_shown(text, spans[n])} are in one word, which has one tag"
            )
        taken = touched[-1]
        widened += words[touched[0]][0] < start or words[taken][1] > end
        found.append((touched[0], taken + 1, kind))
    return tuple(bio(found, len(words))), widened


def _span(text: str, entity: Any, number: int) -> tuple[int, int, str]:
    if isinstance(entity, dict):
        parts = [next((entity[key] for key in keys if key in entity), None) for keys in (START, END, KIND)]
    elif isinstance(entity, list | tuple) and len(entity) == 3:
        parts = list(entity)
    else:
        parts = [None]
    start, end, kind = [*parts, None, None][:3]
    if type(start) is not int or type(end) is not int:
        raise Unfit(f"entity {number} is {entity!r}, and not {{'start': 0, 'end': 4, 'label': ...}}")
    if not isinstance(kind, str) or not kind.strip():
        raise Unfit(f"entity {number} ({start} to {end}) has no label")
    if not 0 <= start < end <= len(text):
        raise Unfit(
            f"entity {number} goes from {start} to {end}, which is not within the {len(text)} characters of the text"
        )
    return start, end, kind.strip()


def _shown(text: str, span: tuple[int, int, str]) -> str:
    return f"{text[span[0] : span[1]]!r} ({span[2]}, {span[0]} to {span[1]})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def name_classes(table: Table, source: Any) -> None:
    """Put the names of the classes in place of their numbers, in lists of a `ClassLabel` of datasets."""
    for column, feature in (getattr(source, "features", None) or {}).items():
        classes = getattr(getattr(feature, "feature", None), "names", None)
        if classes and column in table.columns:
            table.columns[column] = [
                values if values is None else [classes[value] for value in values]
                for values in table.columns[column]
            ]


def types_in(sentences: Sequence[Sentence]) -> tuple[str, ...] | None:
    """Return the sorted entity types in these sentences; None if their tags are not entity tags, but parts of speech, say."""
    tags = {tag for sentence in sentences for tag in sentence.tags}
    if tags == {"O"}:
        return ()
    if not are_of_entities(tuple(tags)):
        return None
    known = [parsed for parsed in map(parse_tag, tags) if parsed is not None]
    return tuple(sorted({kind for prefix, kind in known if prefix != "O"}))


def numbers_of(sentence: Sentence, labels: Sequence[str], index: LabelIndex) -> list[int]:
    """Return the label index of each word. Raises `Unfit` for a tag that is not among the labels."""
    types = types_of(labels)
    tags: Sequence[str] = sentence.tags
    if types:
        for place, tag in enumerate(tags, start=1):
            parsed = parse_tag(tag)
            if parsed is None:
                raise Unfit(
                    f"tag {place}, {tag!r}, is neither O nor B- or I- with a type ({listing(types, 8)})"
                )
            if parsed[0] != "O" and parsed[1] not in types:
                raise Unfit(
                    f"{tag!r} is of none of the {len(types)} types of the training data ({listing(types, 8)})."
                    f"{nearest(parsed[1], types)}".rstrip(".")
                )
        tags = bio(chunks(tags), len(tags))
    found = []
    for tag in tags:
        number = labels.index(tag) if tag in labels else index.find(tag)
        if number is None:
            raise Unfit(
                f"tag {tag!r} is not among the {len(labels)} of the training data ({listing(labels, 8)})."
                f"{nearest(tag, labels)}".rstrip(".")
            )
        found.append(number)
    return found


def marked(text: str, entities: Sequence[dict[str, Any]]) -> str:
    """Mark the entities in a text: `[Ada](person) lives in [London](location)`."""
    parts, at = [], 0
    for entity in entities:
        parts += [text[at : entity["start"]], f"[{text[entity['start'] : entity['end']]}]({entity['label']})"]
        at = entity["end"]
    return "".join([*parts, text[at:]])


def label_of(kind: str) -> str:
    return kind or "entity"


def entities_of(tags: Sequence[str], text: str, spans: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return the entities of tagged words as character spans, with the indices of their words."""
    return [
        {"start": spans[first][0], "end": spans[last - 1][1], "label": label_of(kind),
         "text": text[spans[first][0] : spans[last - 1][1]], "words": (first, last)}
        for first, last, kind in chunks(tags)
    ]  # fmt: skip


def shown(tokens: Sequence[str], tags: Sequence[str]) -> str:
    """Format a list of tokens with its entities marked, or with a tag after each token."""
    if not all(tag == "O" or tag in "BI" or tag[:2] in ("B-", "I-") for tag in tags):
        return " ".join(f"{token}/{tag}" for token, tag in zip(tokens, tags))
    text, spans = text_of(list(tokens))
    return marked(text, entities_of(tags, text, spans))
