"""Texts to token ids, and rows of ids to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.data.doubled import Around


@dataclass(frozen=True)
class Encoded:
    """Token ids and what goes with them, row by row, not padded yet.

    `features`: name -> one integer array for each row. `lengths`: tokens in each row. `truncated`: how many
    rows were cut because they are longer than the model takes.
    """

    features: dict[str, list[np.ndarray]]
    lengths: np.ndarray
    truncated: int
    padding: dict[str, int]

    def __len__(self) -> int:
        return len(self.lengths)

    def pad(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The chosen rows as tensors (rows, longest of them), padded on the right."""
        width = int(self.lengths[list(rows)].max())
        batch = {}
        for name, arrays in self.features.items():
            padded = np.full((len(rows), width), self.padding.get(name, 0), dtype=np.int64)
            for i, row in enumerate(rows):
                padded[i, : len(arrays[row])] = arrays[row]
            batch[name] = torch.from_numpy(padded)
        return batch


def encode_texts(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> Encoded:
    """Tokenize texts, or pairs of texts, with the model's special tokens, which a text may hold already at its ends; longer
    ones are truncated and counted."""
    around = Around.of(tokenizer)
    given = tuple([around.taken_off(text) for text in part] for part in (texts, pairs) if part is not None)
    encoding = tokenizer(
        *given, truncation=True, max_length=max_length, return_attention_mask=True, verbose=False
    )
    names = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in encoding]
    if pairs is None and "token_type_ids" in names:
        names.remove("token_type_ids")  # all zeros, which models take as given
    features = {name: [np.asarray(row, dtype=np.int32) for row in encoding[name]] for name in names}
    lengths = np.array([len(row) for row in features["input_ids"]])
    full = np.flatnonzero(lengths >= max_length)
    truncated = 0
    if len(full):
        again = tokenizer(*[[part[i] for i in full] for part in given], truncation=False, verbose=False)
        truncated = sum(len(row) > max_length for row in again["input_ids"])
    return Encoded(features, lengths, truncated, {"input_ids": tokenizer.pad_token_id or 0})
