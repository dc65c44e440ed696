"""Check the items of a list passed to `predict`; each error names the item by its position."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from graftkit.errors import UserError

NOUNS = {"image": "image", "audio": "sound"}  # by modality; text otherwise


def check_items(items: Sequence[Any], modality: str) -> None:
    """Raise `UserError` for a missing or numeric item, and if rows (mappings) are mixed with anything else."""
    noun = NOUNS.get(modality, "text")
    for number, item in enumerate(items, start=1):
        refuse_no_text(item, f"item {number} of {len(items)}", noun)
    check_kinds(items, (Mapping,))


def check_kinds(items: Sequence[Any], kinds: tuple[type, ...]) -> None:
    """Raise `UserError` for the first item that differs from the first one in whether it is one of these types."""
    odd = next(
        (i for i, item in enumerate(items) if isinstance(item, kinds) != isinstance(items[0], kinds)), None
    )
    if odd is not None:
        raise UserError(
            f"item {odd + 1} of {len(items)} is a {type(items[odd]).__name__}, but the first is a "
            f"{type(items[0]).__name__}; give items of the same type."
        )


def check_texts(texts: Sequence[Any], where: str, names: Sequence[str] | None = None) -> None:
    """Raise `UserError` if a text within an item is missing, empty or a number. `names`: the name of each in errors."""
    for place, text in enumerate(texts):
        name = names[place] if names is not None else f"text {place + 1}"
        refuse_no_text(text, f"the {name} of {where}", "text")
        if not isinstance(text, str):
            raise UserError(f"the {name} of {where} is a {type(text).__name__}, not a text.")
        if not text.strip():
            raise UserError(f"the {name} of {where} is empty.")


def refuse_no_text(item: Any, where: str, noun: str) -> None:
    """Raise `UserError` if an item is missing, a number, or a text with halves of characters."""
    if isinstance(item, str) and not is_unicode(item):
        raise UserError(
            f"{where} is not valid Unicode: {item[:40]!r} has bytes that are not UTF-8, or half of a character."
        )
    if is_nothing(item):
        raise UserError(f"{where} is missing ({item}); remove it, or give {_article(noun)} {noun}.")
    if isinstance(item, numbers.Number):
        hint = f"; write it as a string: {str(item)!r}" if noun == "text" else ""
        raise UserError(f"{where} is the number {item}, not {_article(noun)} {noun}{hint}.")


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, which Python makes of bytes that are not UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_nothing(item: Any) -> bool:
    """Return whether a value is None, NaN, or pandas' NA or NaT."""
    if item is None or type(item).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(item, numbers.Number) and item != item


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"
