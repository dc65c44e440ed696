"""Remove special tokens from the ends of a text if its tokenizer adds them anyway, so that they do not occur twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Around:
    """The special tokens that a tokenizer adds before and after a text, as strings."""

    front: tuple[str, ...]
    back: tuple[str, ...]

    @staticmethod
    def of(tokenizer: Any) -> Around:
        encoding = tokenizer("a", return_special_tokens_mask=True, verbose=False)
        added = np.asarray(encoding["special_tokens_mask"], dtype=bool)
        tokens = [tokenizer.decode([number]) for number in encoding["input_ids"]]
        front = int(np.argmin([*added, False]))
        back = int(np.argmin([*added[::-1], False])) if front < len(tokens) else 0
        return Around(tuple(tokens[:front]), tuple(tokens[len(tokens) - back :]))

    def taken_off(self, text: str) -> str:
        """Return the text without these tokens at its ends; a text that contains nothing else is returned unchanged."""
        shorter = text
        for token in self.front:
            if token and shorter.lstrip().startswith(token):
                shorter = shorter.lstrip().removeprefix(token).lstrip()
        for token in reversed(self.back):
            if token and shorter.rstrip().endswith(token):
                shorter = shorter.rstrip().removesuffix(token).rstrip()
        return shorter if shorter.strip() else text
