"""Split English and Chinese texts into sentences."""

from __future__ import annotations


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, each stripped; joined, they have all its characters but white space."""
    raise NotImplementedError
