"""Encode texts as token ids, and pad rows of ids to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.data.doubled import Around
from graftkit.data.ragged import Ragged
from graftkit.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """Token ids and other features of each row, without padding.

    `features`: name -> the integers of each row. `lengths` (rows,): tokens in each row. `truncated`: number of rows cut to
    the maximum length. `padding`: padding value of a feature, 0 if it is not listed. `special`: special tokens that were added
    to each row. `unknown`: number of tokens, in all rows, that stand for what is not in the vocabulary.
    """

    features: Mapping[str, Ragged]
    lengths: np.ndarray
    truncated: int
    padding: dict[str, int]
    special: int = 0
    unknown: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def pad(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Return the given rows as int64 tensors (rows, longest row), padded on the right."""
        chosen = np.asarray(rows)
        return {
            name: torch.from_numpy(feature.padded(chosen, self.padding.get(name, 0)))
            for name, feature in self.features.items()
        }


def encode_texts(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> Encoded:
    """Tokenize texts, or pairs of texts, with the model's special tokens; ones already present at the ends of a text are not
    doubled. Texts of more than `max_length` tokens are truncated and counted."""
    count = getattr(tokenizer, "num_special_tokens_to_add", None)  # a user's tokenizer may lack it
    special = count(pair=pairs is not None) if count is not None else 0
    if special >= max_length:
        raise UserError(
            f"there is no room for a text: it may have {max_length} token{'s' * (max_length > 1)}, and the tokenizer adds "
            f"{special} special ones. Raise data.max_length, or use fewer virtual tokens in the method."
        )
    around = Around.of(tokenizer)
    given = tuple([around.taken_off(text) for text in part] for part in (texts, pairs) if part is not None)
    fast = getattr(
        tokenizer, "is_fast", False
    )  # without padding, its masks are ones; made here, not in lists of numbers
    encoding = tokenizer(
        *given, truncation=True, max_length=max_length, return_attention_mask=not fast, verbose=False
    )
    names = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in encoding]
    if pairs is None and "token_type_ids" in names:
        names.remove("token_type_ids")  # all zeros, the default of every model
    features = {name: Ragged([np.asarray(row, dtype=np.int32) for row in encoding[name]]) for name in names}
    ids = features["input_ids"]
    lengths = ids.lengths
    if fast:
        features["attention_mask"] = ids.like(np.ones_like(ids.values))
    full = np.flatnonzero(lengths >= max_length)
    truncated = 0
    if len(full):
        again = tokenizer(*[[part[i] for i in full] for part in given], truncation=False, verbose=False)
        truncated = sum(len(row) > max_length for row in again["input_ids"])
    unknown = int(np.count_nonzero(features["input_ids"].values == unknown_of(tokenizer)))
    return Encoded(features, lengths, truncated, {"input_ids": tokenizer.pad_token_id or 0}, special, unknown)


def unknown_of(tokenizer: Any) -> int:
    """Return the id that stands only for what is not in the vocabulary; -1 if there is none."""
    ids = [
        getattr(tokenizer, f"{name}_token_id", None) for name in ("unk", "bos", "eos", "cls", "sep", "pad")
    ]
    return -1 if ids[0] is None or ids[0] in ids[1:] else int(ids[0])
