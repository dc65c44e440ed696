"""BERT's pairs of segments (Devlin et al. 2018, section 3.1, task 2; `create_pretraining_data.py` of the paper's code)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from graftkit.data.source import Pass
from graftkit.tasks.objectives.documents import Texts

SHORT = 0.1  # of the documents, which are cut into shorter rows
RANDOM = 0.5  # of the pairs, whose second segment comes from another document


@dataclass(frozen=True)
class Pairs:
    """The pairs of one pass: for each, the numbers of the first sentence of its segments and of those behind their last.

    `a`, `b`: (pairs, 2) sentences of the whole corpus. `sizes` (pairs,): tokens of both, before they are truncated.
    `random` (pairs,): whether b comes from another document than a.
    """

    a: np.ndarray
    b: np.ndarray
    sizes: np.ndarray
    random: np.ndarray

    def __len__(self) -> int:
        return len(self.random)


class Sentences:
    """The sentences with tokens of some documents: `numbers` (sentences,) in the shards, `sizes` (sentences,) in tokens,
    `begins` (documents + 1,) the first of each document; documents without any are left out. `documents`: their numbers."""

    def __init__(self, texts: Texts) -> None:
        lengths = np.asarray(texts.shards.lengths, dtype=np.int64)
        found = [np.arange(texts.begins[n], texts.begins[n + 1]) for n in texts.numbers]
        found = [numbers[lengths[numbers] > 0] for numbers in found]
        self.documents = np.array([n for n, part in zip(texts.numbers, found) if len(part)], dtype=np.int64)
        self.numbers = np.concatenate([np.zeros(0, dtype=np.int64), *found])
        self.sizes = lengths[self.numbers]
        self.begins = np.concatenate([[0], np.cumsum([len(part) for part in found if len(part)])]).astype(
            np.int64
        )

    def __len__(self) -> int:
        return len(self.documents)


def draw_pairs(sentences: Sentences, most: int, at: Pass) -> Pairs:
    """Draw the pairs of a pass, at most `most` tokens each once they are truncated: a function of (seed, epoch)."""
    rows = [row for document in range(len(sentences)) for row in _of_document(sentences, document, most, at)]
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    return Pairs(table[:, 0:2], table[:, 2:4], table[:, 4], table[:, 5].astype(bool))


def _of_document(
    sentences: Sentences, document: int, most: int, at: Pass
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Yield the pairs of one document as (a begins, a ends, b begins, b ends, tokens, random).

    Sentences are gathered to the target length or the end of the document. A is a random first part of them. With
    probability 1/2, or if there is a single sentence, B is from a random place in another document, and the sentences behind
    A are used again.
    """
    random = at.generator(document, 1)
    first, end = int(sentences.begins[document]), int(sentences.begins[document + 1])
    target = int(random.integers(2, most + 1)) if most >= 2 and random.random() < SHORT else most
    sizes = sentences.sizes
    i = start = first
    length = 0
    while i < end:
        length += int(sizes[i])
        i += 1
        if i < end and length < target:
            continue
        a_end = start + (int(random.integers(1, i - start)) if i - start >= 2 else 1)
        a = int(sizes[start:a_end].sum())
        if i - start == 1 or random.random() < RANDOM:
            other = int(random.integers(0, len(sentences) - 1))
            other += other >= document
            b_start, last = int(sentences.begins[other]), int(sentences.begins[other + 1])
            b_start = int(random.integers(b_start, last))
            b_end, b = b_start + 1, int(sizes[b_start])
            while b < target - a and b_end < last:
                b, b_end = b + int(sizes[b_end]), b_end + 1
            yield start, a_end, b_start, b_end, a + b, 1
            i = a_end
        else:
            yield start, a_end, a_end, i, length, 0
        start, length = i, 0


def truncated(
    random: np.random.Generator, a: np.ndarray, b: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shorten two segments to `most` tokens together: one token of the longer at a time, its first or last by a coin."""
    surplus = len(a) + len(b) - most
    if surplus <= 0:
        return a, b
    fronts = random.random(surplus) < 0.5
    ends = [0, len(a)], [0, len(b)]
    for front in fronts:
        longer = ends[0] if ends[0][1] - ends[0][0] > ends[1][1] - ends[1][0] else ends[1]
        longer[0 if front else 1] += 1 if front else -1
    return a[ends[0][0] : ends[0][1]], b[ends[1][0] : ends[1][1]]
