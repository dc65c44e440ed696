"""Several pairs of `.bin` and `.idx` files, memory-mapped and seen as one sequence of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class Shards:
    """The tokens of a corpus, in memory-mapped files; only index arrays are in memory.

    Attributes:
        lengths: tokens of each sequence, shape (sequences,).
        documents: the first sequence of each document, and the number of sequences, shape (documents + 1,); Megatron's
            `doc_idx`.
        document_bytes: UTF-8 bytes of each document's text, shape (documents,). None for pairs that others wrote.
        statistics: documents, sequences, tokens, bytes, unknown, undecodable, duplicates, seconds ...
    """

    lengths: np.ndarray
    documents: np.ndarray
    document_bytes: np.ndarray | None
    statistics: dict[str, Any]

    def tokens(self, sequence: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Return a copy of the tokens of a sequence, from `start` to `end`, as int64."""
        raise NotImplementedError

    def document(self, document: int) -> np.ndarray:
        """Return a copy of all tokens of a document, as int64."""
        raise NotImplementedError

    def digest(self) -> str:
        """Return a checksum of the shards' checksums, which tells whether two corpora hold the same tokens."""
        raise NotImplementedError


def open_shards(path: str | Path, *, vocabulary: int | None = None) -> Shards:
    """Open pairs of `.bin` and `.idx` files: a folder that `tokenized` wrote, a folder of pairs, or one pair by its prefix.

    `vocabulary`: raise UserError if a token is not below this number. Raises UserError for files that are missing, torn,
    truncated or damaged.
    """
    raise NotImplementedError
