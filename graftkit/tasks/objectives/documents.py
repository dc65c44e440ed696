"""The documents of a corpus as the examples of an objective: which of them, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from graftkit.data.corpora import Corpus, Shards
from graftkit.data.read import Table
from graftkit.data.split import held_out
from graftkit.tasks.base import Examples


@dataclass(frozen=True)
class CorpusTable(Table):
    """A corpus in the place of a table. It has a name for the column of texts, and no rows: documents are not read yet."""

    corpus: Corpus | None = None
    paths: tuple[str, ...] = ()
    column: str | None = None
    documents: str = "auto"

    def take(self, rows: Sequence[int]) -> CorpusTable:
        """Return the corpus unchanged: its documents are chosen once they are counted."""
        return self


@dataclass(frozen=True)
class Documents(Examples):
    """Documents of a corpus: all, or one side of a split by document.

    `share`: the fraction that is held out, 0 for no split; `held`: whether these are the held-out documents. `count`: how
    many they are; 0 as long as the corpus has not been read.
    """

    share: float = 0.0
    seed: int = 0
    held: bool = False
    count: int = 0

    def __len__(self) -> int:
        return self.count

    def __bool__(self) -> bool:
        return True

    @property
    def corpus(self) -> Corpus:
        assert isinstance(self.table, CorpusTable) and self.table.corpus is not None
        return self.table.corpus

    def where(self, row: int) -> str:
        return f"{self.table.source}, document {row + 1}"

    @property
    def paths(self) -> tuple[str, ...]:
        assert isinstance(self.table, CorpusTable)
        return self.table.paths

    @property
    def column(self) -> str | None:
        """The column of texts that the recipe names, if it does."""
        assert isinstance(self.table, CorpusTable)
        return self.table.column

    @property
    def documents(self) -> str:
        """How text files are split into documents."""
        assert isinstance(self.table, CorpusTable)
        return self.table.documents

    def take(self, rows: Sequence[int]) -> Documents:
        return self

    def split(self, share: float, seed: int) -> tuple[Documents, Documents]:
        """Return the documents to train on and those to evaluate on."""
        part = replace(self, share=share, seed=seed)
        return part, replace(part, held=True)

    def numbers(self, documents: int) -> np.ndarray:
        """Return the numbers of these documents among all `documents` of the corpus. Raises `UserError` if there are too
        few to hold any out."""
        if not self.share:
            return np.arange(documents)
        return np.flatnonzero(held_out(documents, self.share, self.seed) == self.held)


class Texts:
    """The tokens of some documents: `numbers` (documents,) of them in `shards`."""

    def __init__(self, shards: Shards, numbers: np.ndarray) -> None:
        self.shards = shards
        self.numbers = numbers
        self.begins = np.asarray(shards.documents, dtype=np.int64)  # first sequence of each document

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each document, (documents,)."""
        ends = np.concatenate([[0], np.cumsum(self.shards.lengths, dtype=np.int64)])
        return np.diff(ends[self.begins])[self.numbers]

    @property
    def bytes(self) -> int:
        """The size of the documents' texts in UTF-8."""
        known = self.shards.document_bytes
        return 0 if known is None else int(np.asarray(known)[self.numbers].sum())

    def sentences(self, document: int) -> range:
        """Return the sequences of a document, its sentences if the corpus was split into these."""
        number = self.numbers[document]
        return range(int(self.begins[number]), int(self.begins[number + 1]))

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Return tokens `start` to `end`, exclusive, of a document as int64."""
        sequences = self.sentences(document)
        if len(sequences) == 1:
            return self.shards.tokens(sequences[0], start, end)
        return self.shards.document(int(self.numbers[document]))[start:end]

    def statistics(self) -> dict[str, Any]:
        """Return what was counted in the whole corpus while it was read."""
        names = ("documents", "tokens", "bytes", "unknown", "undecodable", "duplicates")
        found = self.shards.statistics
        return {"corpus": {name: found[name] for name in names if name in found}}


class Joined:
    """Documents in sequence, as one row of tokens that is never built; `gap` ends a document if another follows.

    `begins` (documents + 1,): where each document begins, its own `gap` included; `total`: the number of tokens.
    """

    def __init__(self, texts: Texts, gap: int | None = None) -> None:
        self.texts, self.gap = texts, gap
        self.begins = np.concatenate([[0], np.cumsum(texts.lengths + (gap is not None))])
        self.total = int(self.begins[-1]) - (gap is not None)

    def document(self, place: int) -> int:
        """Return the number of the document, counted in `texts`, that a place lies in."""
        return int(np.searchsorted(self.begins, place, side="right")) - 1

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Return the tokens from place `start` to `end`, exclusive, as int64."""
        document, parts = self.document(start), []
        while start < end:
            begin = int(self.begins[document])
            behind = int(self.begins[document + 1]) - (self.gap is not None)  # its last token, exclusive
            parts.append(self.texts.tokens(document, start - begin, min(end, behind) - begin))
            if self.gap is not None and behind < end:
                parts.append(np.array([self.gap]))
            start, document = behind + (self.gap is not None), document + 1
        return np.concatenate(parts).astype(np.int64)
