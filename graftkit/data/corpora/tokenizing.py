"""Tokenize a corpus once, in parallel, into shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftkit.data.corpora.corpus import Corpus
from graftkit.data.corpora.shards import Shards


def tokenized(
    corpus: Corpus,
    tokenizer: Any,
    folder: str | Path,
    *,
    sentences: bool = False,
    keep_duplicates: bool = True,
    processes: int | None = None,
    show: Callable[[int, int], None] | None = None,
) -> Shards:
    """Tokenize a corpus into the shards of a folder, and return them. What a killed call has finished is kept.

    Args:
        tokenizer: of transformers, or a `tokenizers.Tokenizer`. No special tokens are added.
        folder: a new one, or one that an earlier call with the same corpus, tokenizer and options wrote.
        sentences: a document becomes one sequence per sentence, else one sequence.
        keep_duplicates: if False, leave out documents that an earlier one equals after normalization.
        processes: default: as many as there are cores, at most 8. The result does not depend on it.
        show: called with the bytes done and the bytes of the whole corpus whenever a shard is finished.

    Raises UserError for an empty corpus, for documents of more than 10 MB, and if the folder holds anything else.
    """
    raise NotImplementedError
