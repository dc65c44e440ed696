"""Labels that people would take for one: they differ in case, in blanks, or in how a character is coded."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

SHOWN = 5  # groups of labels that are told one by one


def _plain(label: str) -> str:
    """Without blanks that cannot be seen, and with compatibility characters as what they stand for."""
    text = unicodedata.normalize("NFKC", label)
    return " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())


WAYS: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda label: unicodedata.normalize("NFC", label), "look the same (accents composed and decomposed)"),
    (_plain, "differ only in blanks, or in characters that look alike"),
    (str.casefold, "differ only in upper and lower case"),
    (lambda label: _plain(_plain(label).casefold()), "differ only in case and in blanks or coding"),
)


def alike(labels: Sequence[str]) -> list[str]:
    """A warning for each group of labels that look like one, and one for how many more there are."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(WAYS[-1][0](label), []).append(label)
    found = []
    for group in groups.values():
        if len(group) > 1:
            how = next(words for form, words in WAYS if len(set(map(form, group))) == 1)
            found.append(f"labels {', '.join(map(repr, group[:-1]))} and {group[-1]!r} {how}.")
    if len(found) > SHOWN:
        return [*found[:SHOWN], f"{len(found) - SHOWN} more groups of labels look like one."]
    return found
