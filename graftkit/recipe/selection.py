"""The small language that selects parts of a model. No torch here.

attention   ffn   norms   embeddings   all-linear   head   pooler      a kind of part, everywhere
convs   experts                                                        convolutions; experts kept as one parameter
q   k   v   o   up   gate   down                                       one linear layer of every block
blocks   blocks[-2:]   blocks[0]   blocks[-4:].attention               whole blocks, or parts of them
re:.*\\.dense                                                          module names, full match
q_proj   output.dense                                                  a part of a module's name
q,v                                                                    several, by commas

`all-linear` means the linear layers of the body, or its convolutions if it has none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from graftkit.errors import UserError
from graftkit.recipe.patterns import Pattern

ROLES_OF_WORD = {
    "attention": ("q", "k", "v", "o", "qkv"),
    "q": ("q", "qkv"),
    "k": ("k", "qkv"),
    "v": ("v", "qkv"),
    "o": ("o",),
    "ffn": ("up", "gate", "down", "experts"),
    "up": ("up",),
    "gate": ("gate",),
    "down": ("down",),
    "norms": ("norm",),
    "embeddings": ("embedding",),
    "all-linear": ("q", "k", "v", "o", "qkv", "up", "gate", "down", "linear"),
    "convs": ("conv",),
    "experts": ("experts",),
    "head": ("head",),
    "pooler": ("pooler",),
}
WORDS = (*ROLES_OF_WORD, "blocks")
_BLOCKS = re.compile(r"^blocks(?:\[(?P<index>[^\]]*)\])?(?:\.(?P<rest>.+))?$")
_INDEX = re.compile(r"^\s*(-?\d+)?\s*(:\s*(-?\d+)?\s*)?$")


@dataclass(frozen=True)
class Term:
    """One part of a selection; a field that is `None` does not restrict it."""

    text: str
    blocks: slice | int | None = None
    in_blocks: bool = False
    roles: tuple[str, ...] | None = None
    suffix: str | None = None
    pattern: Pattern | None = None


def parse(selection: str) -> tuple[Term, ...]:
    """Parse a selection. Raises `UserError` if it cannot be read."""
    if not isinstance(selection, str) or not selection.strip():
        raise UserError(f"selection {selection!r} is empty; use, for example, 'q,v' or 'blocks[-2:]'.")
    if selection.startswith("re:"):
        return (Term(selection, pattern=Pattern(selection[3:], f"selection {_short(selection)!r}")),)
    return tuple(_term(part.strip(), selection) for part in selection.split(","))


def _short(selection: str) -> str:
    return selection if len(selection) <= 200 else f"{selection[:200]}..."


def _term(text: str, selection: str) -> Term:
    if not text:
        raise UserError(f"selection {selection!r} has an empty part between commas.")
    match = _BLOCKS.match(text)
    if match is None:
        if any(character in text for character in "[]():*"):
            raise UserError(
                f"selection {selection!r}: {text!r} cannot be read. Write blocks[-2:] for blocks, "
                "re:PATTERN for a regular expression, or a word such as attention, ffn, q, v or norms."
            )
        return _named(text, None, False, text)
    index, rest = match["index"], match["rest"]
    blocks = _slice(index, selection) if index is not None else None
    if rest is None:
        return Term(text, blocks=blocks, in_blocks=True)
    return _named(text, blocks, True, rest)


def _named(text: str, blocks: slice | int | None, in_blocks: bool, word: str) -> Term:
    if word in ROLES_OF_WORD:
        return Term(text, blocks, in_blocks, roles=ROLES_OF_WORD[word])
    return Term(text, blocks, in_blocks, suffix=word)


def _slice(index: str, selection: str) -> slice | int:
    match = _INDEX.match(index)
    if match is None or not index.strip():
        raise UserError(
            f"selection {selection!r}: blocks[{index}] cannot be read; write blocks[-2:] or blocks[0]."
        )
    first, ranged, last = match.groups()
    if ranged is None:
        return int(first)
    return slice(int(first) if first else None, int(last) if last else None)
