"""Regular expressions of recipes, grafts and adapters, matched within a time limit. No torch here."""

from __future__ import annotations

import re
import time

import regex

from graftkit.errors import UserError

SECONDS = 2.0  # for all names together; an ordinary pattern takes microseconds for each
MOST_REPEATS = 10_000  # of nested counts together: `regex` writes them out


class Pattern:
    """A regular expression with the syntax and meaning of `re`.

    A hostile or careless one, such as `(.*.*)*x`, would keep `re` busy for years. The library `regex` takes a timeout.
    Raises `UserError`, which starts with `where`, for an invalid expression, and for one that takes too long to match.
    """

    def __init__(self, text: str, where: str) -> None:
        self.where, self.left = where, SECONDS
        try:
            re.compile(text)
            _refuse_counts(text)
            self._compiled = regex.compile(text)
        except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"{where}: the regular expression is invalid: {error}.") from None

    def fullmatch(self, name: str) -> bool:
        """Return whether the whole name matches."""
        start = time.monotonic()
        try:
            return self._compiled.fullmatch(name, timeout=max(self.left, 0.001)) is not None
        except TimeoutError:
            raise UserError(
                f"{self.where}: the regular expression takes longer than {SECONDS:.0f} seconds. Write it without repeats "
                "inside repeats, such as (.*)*, or name the modules."
            ) from None
        finally:
            self.left -= time.monotonic() - start


def _refuse_counts(text: str) -> None:
    """Raise `ValueError` for counts that multiply to a large number, and for braces that are no counts."""
    plain = re.sub(r"\\.", "", text, flags=re.DOTALL)
    counts = re.findall(r"\{(\d*),?(\d*)\}", plain)
    if plain.count("{") != len(counts):
        raise ValueError("write \\{ for a brace that is not a number of repeats")
    product = 1
    for least, most in counts:
        product *= max(int(most or 0), int(least or 0), 1)
        if product > MOST_REPEATS:
            raise ValueError(f"its numbers of repeats multiply to more than {MOST_REPEATS:,}")
