"""Rows of GLM's pre-training: stretches of a corpus with blanks, drawn anew in each epoch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.data.ragged import Ragged, mask
from graftkit.data.source import Pass
from graftkit.tasks.objectives.base import PLACES, ROWS, TARGETS, TokenRows
from graftkit.tasks.objectives.documents import Documents, Texts
from graftkit.tasks.objectives.masking import edges
from graftkit.tasks.shared.blanks import Infilling, Marks, Text, corrupt

# tokens of a row for each token of its text: a blank takes two, and of n tokens about 0.05 n begin a blank
GROWTH = 1.14
REMEMBERED = (
    256  # rows of which the draws are kept, as they are needed to count the targets and again to make a batch
)


class BlankRows(TokenRows):
    """Rows of equally many tokens, cut from the documents in sequence: [CLS] tokens [SEP] tokens [SEP], with a separator
    between two documents, and blanks in them. Tokens behind the last full row are left out (`dropped`).

    A row with its blanks has at most `max_length` tokens: there are no more blanks than fit. `two`: tokens have two
    positions; otherwise one that goes on through both parts.
    """

    uniform = False  # rows differ in their number of blanks

    def __init__(
        self, examples: Documents, texts: Texts, tokenizer: Any, max_length: int, marks: Marks, *,
        mode: str, shuffle: bool, block: float, two: bool,
    ) -> None:  # fmt: skip
        self.first, self.last = edges(tokenizer)
        around = (self.first is not None) + (self.last is not None)
        room = max_length - around
        self._lay_out(texts)
        total = int(self.begins[-1]) - (self.last is not None)
        self.body = max(1, min(int((room - 2) / GROWTH), total))
        rows = total // self.body
        super().__init__(examples, texts, rows, self.body + around, int(texts.lengths.sum()))
        self.dropped = total - rows * self.body
        self.most = max(1, (room - self.body) // 2)
        self.tokenizer, self.marks, self.two = tokenizer, marks, two
        self.mode, self.shuffle, self.block = mode, shuffle, block
        self._made = functools.lru_cache(REMEMBERED)(self._make)

    def _lay_out(self, texts: Texts) -> None:
        """Find where each sequence of the corpus, a sentence or a document, begins among the tokens of all rows."""
        first, behind = texts.begins[texts.numbers], texts.begins[texts.numbers + 1]
        ranges = [np.arange(a, b) for a, b in zip(first, behind)]
        self.sequences = np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)
        self.document = np.repeat(np.arange(len(ranges)), behind - first)  # of each sequence
        self.ends = np.append(self.document[1:] != self.document[:-1], True)  # whether it ends its document
        sizes = texts.shards.lengths[self.sequences] + self.ends * (self.last is not None)
        self.begins = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def text(self, row: int) -> Text:
        """Return the tokens of a row before any is left out."""
        start, end = row * self.body, (row + 1) * self.body
        ids: list[np.ndarray] = [] if self.first is None else [np.array([self.first])]
        length = len(ids)
        sentences: list[tuple[int, int, int]] = []  # document, start, end
        number = int(np.searchsorted(self.begins, start, side="right")) - 1
        while start < end:
            begin, behind = int(self.begins[number]), int(self.begins[number + 1])
            gap = self.last is not None and bool(self.ends[number])
            until = min(end, behind - gap)
            if until > start:
                sequence = int(self.sequences[number])
                ids.append(self.texts.shards.tokens(sequence, start - begin, until - begin))
                sentences.append((int(self.document[number]), length, length + until - start))
                length += until - start
            if gap and behind <= end:
                ids.append(np.array([self.last]))
                length += 1
            start, number = behind, number + 1
        if self.last is not None:
            ids.append(np.array([self.last]))
        runs: dict[int, tuple[int, int]] = {}
        for document, first, behind in sentences:
            runs[document] = runs.get(document, (first, behind))[0], behind
        pairs = [(first, behind) for _, first, behind in sentences]
        joined = np.concatenate(ids).astype(np.int64)
        if not pairs:  # separators alone, of empty documents
            runs, pairs = {0: (0, len(joined))}, [(0, len(joined))]
        return Text(joined, np.array(list(runs.values())), np.array(pairs))

    def infilling(self, row: int, at: Pass) -> Infilling:
        """Return a row with its blanks: a function of (seed, epoch, row)."""
        return self._made(row, at.seed, at.epoch)

    def _make(self, row: int, seed: int, epoch: int) -> Infilling:
        return corrupt(
            Pass(seed, epoch).generator(row), self.text(row), self.marks, mode=self.mode, shuffle=self.shuffle,
            block=self.block, most=self.most,
        )  # fmt: skip

    def units_of(self, rows: np.ndarray, at: Pass) -> float:
        return float(sum(len(self.infilling(int(row), at).targets) for row in rows))

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        made = [self.infilling(int(row), at) for row in rows]
        everything = np.arange(len(made))
        ids = Ragged([one.ids for one in made])
        places = Ragged([one.positions[0] if self.two else np.arange(len(one.ids)) for one in made])
        numbers = Ragged([one.positions[1] for one in made])
        targets = [one.targets for one in made]
        arrays = {
            "input_ids": ids.padded(everything, self.tokenizer.pad_token_id or 0),
            "attention_mask": mask(ids.lengths),
            "position_ids": places.padded(everything, 0),
            "block_position_ids": numbers.padded(everything, 0),
            TARGETS: np.concatenate(targets),
            ROWS: np.repeat(everything, list(map(len, targets))),
            PLACES: np.concatenate([np.arange(one.part_a, len(one.ids)) for one in made]),
        }
        return {
            name: torch.from_numpy(np.ascontiguousarray(array, np.int64)) for name, array in arrays.items()
        }

    def where(self, row: int) -> str:
        number = int(np.searchsorted(self.begins, row * self.body, side="right")) - 1
        return self.examples.where(int(self.texts.numbers[self.document[number]]))

    def shown(self) -> str:
        """Return the two parts of the first row."""
        made = self.infilling(0, Pass())
        parts = made.ids[: made.part_a], made.ids[made.part_a :]
        return "\n\n".join(self.tokenizer.decode(part.tolist()) for part in parts)
