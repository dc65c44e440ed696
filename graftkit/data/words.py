"""Split texts into words, in any script."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

Spans = list[tuple[int, int]]
# scripts that put no space between words: each character is a word here
UNSPACED = (
    "CJK UNIFIED",
    "CJK COMPATIBILITY",
    "HIRAGANA",
    "KATAKANA",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
)
JOINERS = "\u200c\u200d\ufe0e\ufe0f"


@functools.lru_cache(maxsize=65536)
def _kind(character: str) -> str:
    """Return 'space'; 'letter', which continues a word; 'mark', which continues whatever precedes it; or 'single'."""
    if character.isspace():
        return "space"
    category = unicodedata.category(character)
    if category[0] == "M" or character in JOINERS:
        return "mark"
    if category[0] == "L" and unicodedata.name(character, "").startswith(UNSPACED):
        return "single"
    return "letter" if category[0] in "LN" or character == "_" else "single"


def split_words(text: str) -> Spans:
    """Return the spans of the words of a text: runs of letters and digits, and every other non-space character alone."""
    spans: list[list[int]] = []
    before = "space"
    for place, character in enumerate(text):
        kind = _kind(character)
        if kind != "space":
            if before != "space" and (kind == "mark" or kind == before == "letter"):
                spans[-1][1] = place + 1
                kind = before
            else:
                spans.append([place, place + 1])
                kind = "letter" if kind == "mark" else kind
        before = kind
    return [(start, end) for start, end in spans]


def assign(words: Spans, tokens: Sequence[tuple[int, int]]) -> tuple[Spans, list[int]]:
    """Return the words that have a token, and the number of the word of each token, -1 for one of no character.

    `tokens`: the characters of each. Words that share a token are joined; a token that begins in a word belongs to it.
    """
    first: list[int] = []
    joined: set[int] = set()  # words that continue the one before
    for start, end in tokens:
        touched = [i for i, (a, b) in enumerate(words) if a < end and b > start]
        first.append(touched[0] if touched else -1)
        joined.update(touched[1:])
    used = set(first)
    spans: Spans = []
    number: dict[int, int] = {}
    for i, (start, end) in enumerate(words):
        if i in joined and spans:
            spans[-1] = (spans[-1][0], end)
        elif i in used:
            spans.append((start, end))
        else:
            continue
        number[i] = len(spans) - 1
    return spans, [number.get(i, -1) for i in first]


def words_of(text: str) -> list[str]:
    """Return the words of a text as `split_words` finds them, without punctuation and symbols."""
    return [text[a:b] for a, b in split_words(text) if text[a].isalnum() or text[a] == "_"]
