"""Align words of texts with a model's tokens, and split long texts into parts.

Lists of tokens are joined by spaces into a text. Words and tokens are aligned by their character offsets, which every
fast tokenizer provides, so it does not matter how a tokenizer represents a space or the rest of a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.data.words import Spans, split_words
from graftkit.errors import UserError

STOPS = tuple(".!?\u3002\uff01\uff1f")


def text_of(value: str | list[str]) -> tuple[str, Spans]:
    """Return a text and the spans of its words; `value` is the text, or its tokens."""
    if isinstance(value, str):
        return value, split_words(value)
    spans, at = [], 0
    for token in value:
        spans.append((at, at + len(token)))
        at += len(token) + 1
    return " ".join(value), spans


@dataclass(frozen=True)
class Part:
    """One input sequence: a whole example, or a part of it that ends at a word boundary.

    `ids`: its tokens, including special ones. `words` (words,): indices of the example's words; `places` (words,): the
    first token of each in `ids`. `own` (words,): whether that token belongs to this word, not to the word before.
    """

    example: int
    ids: np.ndarray
    words: np.ndarray
    places: np.ndarray
    own: np.ndarray
    cut: bool = False  # a word was longer than a part may be


def split_all(
    tokenizer: Any, texts: Sequence[str], words: Sequence[Spans], max_length: int, source: str
) -> list[Part]:
    """Split every text into parts of at most `max_length` tokens, including special tokens.

    Raises UserError if a tokenizer does not provide offsets, or if special tokens leave no room.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {source} does not provide character offsets of its tokens, which tag() needs; use a model "
            "with a fast tokenizer (tokenizer.json)."
        )
    before, behind = special_tokens(tokenizer)
    room = max_length - len(before) - len(behind)
    if room < 1:
        raise UserError(
            f"data.max_length is {max_length}, of which {len(before) + len(behind)} are special tokens of {source}; raise it."
        )
    encoding = tokenizer(
        list(texts), add_special_tokens=False, truncation=False, return_offsets_mapping=True,
        return_attention_mask=False, verbose=False,
    )  # fmt: skip
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    parts = []
    for example, (text, spans) in enumerate(zip(texts, words)):
        ids, offsets = encoding["input_ids"][example], encoding["offset_mapping"][example]
        places, own = align(text, spans, offsets)
        kept = np.flatnonzero(places >= 0)
        at = places[kept]
        for start, end, stop, cut in _portions(at, own[kept], _ends(text, spans, kept), len(ids), room):
            inside = kept[_between(at, start, stop)]
            chosen = [*before, *ids[start:end], *behind] or [filler]
            parts.append(Part(
                example, np.array(chosen, dtype=np.int32), inside, places[inside] - start + len(before), own[inside], cut
            ))  # fmt: skip
    return parts


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer adds before and after a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    ids, special = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
    first = special.index(0) if 0 in special else len(ids)
    last = len(ids) - special[::-1].index(0) if 0 in special else len(ids)
    return ids[:first], ids[last:]


def align(text: str, spans: Spans, offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the token of each word (words,), -1 if it has none, and whether no earlier word has the same token.

    It is the first token with a non-space character of the word; a token that spans several words counts for each.
    """
    places, own = np.full(len(spans), -1), np.zeros(len(spans), dtype=bool)
    word = 0
    for token, (start, end) in enumerate(offsets):
        while start < end and text[start].isspace():
            start += 1
        if start == end:
            continue
        while word < len(spans) and spans[word][1] <= start:
            word += 1
        reached, first = word, True
        while reached < len(spans) and spans[reached][0] < end:
            if places[reached] < 0:
                places[reached], own[reached] = token, first
                first = False
            reached += 1
    return places, own


def _ends(text: str, spans: Spans, kept: np.ndarray) -> np.ndarray:
    """Return whether a sentence may end before each of the words `kept`."""
    before = (spans[word - 1][1] if word else 0 for word in kept)  # end of the word before
    return np.array([end > 0 and text[end - 1] in STOPS for end in before], dtype=bool)


def _between(numbers: np.ndarray, low: int, high: int) -> slice:
    """Return the slice of the sorted `numbers` that are at least `low` and below `high`."""
    first, last = np.searchsorted(numbers, [low, high])
    return slice(int(first), int(last))


def _portions(
    places: np.ndarray, own: np.ndarray, ends: np.ndarray, tokens: int, room: int
) -> list[tuple[int, int, int, bool]]:
    """Return the tokens of each part: (start, end of those that are read, end, whether some are dropped).

    A part is as long as possible, but ends at a sentence boundary if there is one in its last quarter. A word of more than
    `room` tokens is truncated.
    """
    if tokens <= room:
        return [(0, tokens, tokens, False)]
    bounds = places[own]
    stops = set(places[own & ends].tolist())
    found, start = [], 0
    while tokens - start > room:
        fitting = bounds[_between(bounds, start + 1, start + room + 1)]
        good = [int(b) for b in fitting if int(b) in stops and b >= start + 0.75 * room]
        if len(fitting):
            stop = good[-1] if good else int(fitting[-1])
            found.append((start, stop, stop, False))
        else:  # one word alone is longer
            later = int(np.searchsorted(bounds, start, side="right"))
            stop = int(bounds[later]) if later < len(bounds) else tokens
            found.append((start, start + room, stop, True))
        start = stop
    if start < tokens:
        found.append((start, tokens, tokens, False))
    return found
