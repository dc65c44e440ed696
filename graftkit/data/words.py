"""Words of a text of any script, by a simple rule that needs no dictionary."""

from __future__ import annotations

import re

# scripts that are written without blanks between words: each character counts as a word
ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Chinese characters
)
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text: runs of letters, digits and underscores; single characters of scripts without blanks."""
    return WORD.findall(text)
