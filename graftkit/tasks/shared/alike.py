"""Find labels that a reader would take for the same: they differ only in case, whitespace or Unicode form."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

SHOWN = 5  # groups of labels that get a warning of their own


def _plain(label: str) -> str:
    """Return a label in Unicode form NFKC, without invisible characters and with single spaces."""
    text = unicodedata.normalize("NFKC", label)
    return " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())


WAYS: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda label: unicodedata.normalize("NFC", label), "look the same (accents composed and decomposed)"),
    (_plain, "differ only in whitespace, or in characters that look alike"),
    (str.casefold, "differ only in case"),
    (lambda label: _plain(_plain(label).casefold()), "differ only in case and in whitespace or Unicode form"),
)


def alike(labels: Sequence[str]) -> list[str]:
    """Return a warning for each group of labels that look alike, and one that counts the groups beyond the first 5."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(WAYS[-1][0](label), []).append(label)
    found = []
    for group in groups.values():
        if len(group) > 1:
            how = next(words for form, words in WAYS if len(set(map(form, group))) == 1)
            found.append(f"labels {', '.join(map(repr, group[:-1]))} and {group[-1]!r} {how}.")
    if len(found) > SHOWN:
        return [*found[:SHOWN], f"{len(found) - SHOWN} more groups of labels look alike."]
    return found
