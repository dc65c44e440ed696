"""Errors that a user can fix: each says what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input. The command line prints only its message and exits with 1."""


class Note(Warning):
    """Something that a user should know, and that stops nothing. The command line prints its message."""


class NoGoodRows(UserError):
    """All rows are bad; `skipped` has a message for each of them."""

    def __init__(self, message: str, skipped: Iterable[str]) -> None:
        super().__init__(message)
        self.skipped = tuple(skipped)


class NotFoldable(UserError):
    """A graft has no equivalent in the plain architecture; the message gives the reason."""


class Interrupted(Exception):
    """A run was stopped by Ctrl-C after its checkpoint was written; the message says how to resume."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'label'?"` for the entry of `known` closest to `word`, or an empty string."""
    names = list(known)
    matches = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if not matches:
        folded = {name.lower(): name for name in names}
        matches = [folded[m] for m in difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.5)]
    return f" Did you mean '{matches[0]}'?" if matches else ""


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Join names with commas; after `limit`, give only the number of remaining ones."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return f"{shown} ... and {len(names) - limit} more" if len(names) > limit else shown


def shown(value: object, limit: int = 200) -> str:
    """Return `repr(value)`, shortened to `limit` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; nested too deeply
        return "too large to show"
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
