"""Blanks in a text: which tokens are left out, and the two parts that a GLM reads. Pure functions of a random generator.

Du et al. 2022, section 2.1, and the authors' configuration. A text of n tokens becomes part A, in which each blank is one
mask token, and part B, in which each blank is a start token and the blank's tokens. The targets of part B are the same
tokens followed by an end token, so there is one for each input of part B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.errors import UserError, listing

SHARE = 0.15  # of the tokens, in token and sentence mode
MEAN_SPAN, LONGEST_SPAN = 3, 39  # of the Poisson distribution of span lengths
SHORTEST_DOCUMENT = 0.25  # share of the text that is left out in document mode, at least
MIXTURE = (0.5, 0.3, 0.2)  # token, sentence and document mode in the 10B recipe

# tokens that a GLM needs beside those of any tokenizer, by the fields of `Marks`
NAMES = {
    "sentence": "[sMASK]",
    "document": "[gMASK]",
    "start": "<|startofpiece|>",
    "end": "<|endofpiece|>",
    "block": "[dBLOCK]",
}

Spans = np.ndarray  # (spans, 2) int64: start and end, exclusive, of each, in the order of the text


@dataclass(frozen=True)
class Text:
    """The tokens of a row, and what blanks may consist of.

    `runs` (runs, 2): start and end of each stretch of tokens of one document, without special tokens; no blank reaches
    beyond one. `sentences` (sentences, 2): the same for sentences, each within a run.
    """

    ids: np.ndarray
    runs: Spans
    sentences: Spans

    @property
    def tokens(self) -> int:
        """The number of tokens that may be left out."""
        return int((self.runs[:, 1] - self.runs[:, 0]).sum())


@dataclass(frozen=True)
class Marks:
    """Token ids: the masks of the three modes, the start and end of a blank, and what may stand in its place."""

    token: int
    sentence: int
    document: int
    start: int
    end: int
    block: int

    @property
    def masks(self) -> tuple[int, int, int]:
        return self.token, self.sentence, self.document


@dataclass(frozen=True)
class Infilling:
    """A text with blanks, as a model reads it.

    ids (A + B,): part A, then part B; `part_a`: tokens of part A. positions (2, A + B): the place in part A, of part B that
    of its mask; and the number within the blank, 1, 2, ..., 0 in part A. targets (B,): the token that each of part B
    predicts.
    """

    ids: np.ndarray
    part_a: int
    positions: np.ndarray
    targets: np.ndarray


def marks_of(tokenizer: Any, owner: str) -> Marks:
    """Return the marks of a tokenizer. Raises `UserError`, for `owner`, if it lacks some."""
    known = tokenizer.get_vocab()
    lacking = [name for name in NAMES.values() if name not in known]
    if tokenizer.mask_token_id is None:
        lacking.insert(0, "a mask token")
    if lacking:
        raise UserError(
            f"{owner} needs the tokens of a GLM, but the tokenizer of the model lacks {listing(lacking)}. Begin with a new "
            "model, such as size=glm-mini, whose tokenizer has them."
        )
    return Marks(tokenizer.mask_token_id, **{field: known[name] for field, name in NAMES.items()})


def draw_lengths(random: np.random.Generator, runs: Spans, total: int, most: int) -> list[list[int]]:
    """Draw span lengths, Poisson(3) without 0 and at most 39, until their sum is at least `total` or there are `most`.

    Each goes to a run with a probability in proportion to the room left in it, and is cut to that room, as there is at
    least one token between two spans. Returns the lengths in each run.
    """
    found: list[list[int]] = [[] for _ in runs]
    room = runs[:, 1] - runs[:, 0]  # for one more span
    drawn = count = 0
    while drawn < total and count < most and room.any():
        length = 0
        while not 0 < length <= LONGEST_SPAN:
            length = int(random.poisson(MEAN_SPAN))
        run = int(np.searchsorted(np.cumsum(room), random.integers(room.sum()), side="right"))
        length = min(length, int(room[run]))
        found[run].append(length)
        room[run] = max(0, room[run] - length - 1)
        drawn, count = drawn + length, count + 1
    return found


def draw_tokens(random: np.random.Generator, text: Text, most: int) -> Spans:
    """Token mode: spans of `draw_lengths` to 15% of the text, placed uniformly among all places where no two touch."""
    spans: list[tuple[int, int]] = []
    lengths = draw_lengths(random, text.runs, max(1, int(SHARE * text.tokens)), most)
    for (start, end), drawn in zip(text.runs.tolist(), lengths):
        free = end - start - sum(drawn)
        # each span follows another number of the free tokens, so at least one lies between two spans
        before = np.sort(random.choice(free + 1, len(drawn), replace=False))
        behind = np.cumsum([0, *drawn])
        spans += [
            (start + int(a) + int(b), start + int(a) + int(b) + n) for a, b, n in zip(before, behind, drawn)
        ]
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def draw_sentences(random: np.random.Generator, text: Text, most: int) -> Spans:
    """Sentence mode: whole sentences in random order until 15% of the text."""
    order = random.permutation(len(text.sentences))[:most]
    sizes = np.cumsum((text.sentences[:, 1] - text.sentences[:, 0])[order])
    count = int(np.searchsorted(sizes, int(SHARE * text.tokens))) + 1
    return text.sentences[np.sort(order[:count])]


def draw_document(random: np.random.Generator, text: Text, most: int) -> Spans:
    """Document mode: one span of 25 to 100% of a run, half of the time its end."""
    sizes = text.runs[:, 1] - text.runs[:, 0]
    run = int(np.searchsorted(np.cumsum(sizes), random.integers(sizes.sum()), side="right"))
    size = int(sizes[run])
    length = max(1, round(random.uniform(SHORTEST_DOCUMENT, 1) * size))
    suffix = random.random() < 0.5
    inside = int(random.integers(size - length + 1))
    start = int(text.runs[run, 0]) + (size - length if suffix else inside)
    return np.array([[start, start + length]], dtype=np.int64)


Draw = Callable[[np.random.Generator, Text, int], Spans]
MODES: dict[str, tuple[Draw, Callable[[Marks], int]]] = {
    "token": (draw_tokens, lambda marks: marks.token),
    "sentence": (draw_sentences, lambda marks: marks.sentence),
    "document": (draw_document, lambda marks: marks.document),
}
MIXED = "mixture"


def mode_of(random: np.random.Generator, mode: str, shares: Sequence[float] = MIXTURE) -> str:
    """Return the mode itself, or for a mixture one of the three, drawn with these shares."""
    names = list(MODES)
    return names[int(random.choice(len(names), p=shares))] if mode == MIXED else mode


def draw_spans(random: np.random.Generator, text: Text, mode: str, most: int) -> tuple[str, Spans]:
    """Draw the blanks of a text of at least one token: at most `most`, in the order of the text. Returns the mode too.

    A text of a single sentence has no sentence mode: nothing would be left to fill it in by. It gets token mode instead.
    """
    chosen = mode_of(random, mode)
    if MODES[chosen][0] is draw_sentences and len(text.sentences) < 2:
        chosen = next(iter(MODES))
    return chosen, MODES[chosen][0](random, text, most)


def infill(
    ids: np.ndarray,
    spans: Spans,
    mask: int,
    marks: Marks,
    order: np.ndarray | None = None,
    blocked: np.ndarray | None = None,
) -> Infilling:
    """Return the two parts of a text with blanks.

    `order`: in which the blanks stand in part B, by default that of the text. `blocked` (tokens of all spans,), in the order
    of part B: which of its inputs are replaced by the block token.
    """
    sizes = spans[:, 1] - spans[:, 0]
    kept = np.ones(len(ids), dtype=bool)
    inside = np.concatenate([np.arange(start, end) for start, end in spans])
    kept[inside] = False
    kept[spans[:, 0]] = True
    masked = ids.copy()
    masked[spans[:, 0]] = mask
    part_a = masked[kept]
    places = np.cumsum(kept)[spans[:, 0]] - 1  # of each mask in part A
    order = np.arange(len(spans)) if order is None else order
    written = np.concatenate([ids[start:end] for start, end in spans[order]])
    ends = np.cumsum(sizes[order])
    read = written if blocked is None else np.where(blocked, marks.block, written)
    part_b = np.insert(read, ends - sizes[order], marks.start)
    targets = np.insert(written, ends, marks.end)
    numbers = np.concatenate([np.arange(1, size + 2) for size in sizes[order]])
    positions = np.zeros((2, len(part_a) + len(part_b)), dtype=np.int64)
    positions[0] = np.concatenate([np.arange(len(part_a)), np.repeat(places[order], sizes[order] + 1)])
    positions[1, len(part_a) :] = numbers
    return Infilling(np.concatenate([part_a, part_b]), len(part_a), positions, targets)


def corrupt(
    random: np.random.Generator,
    text: Text,
    marks: Marks,
    *,
    mode: str = "token",
    shuffle: bool = True,
    block: float = 0.0,
    most: int = 1_000_000,
) -> Infilling:
    """Draw the blanks of a text and return its two parts.

    `shuffle`: part B has the blanks in random order (section 2.1: so that it learns how they depend on one another); `block`:
    share of part B's inputs, in token mode, that are replaced by the block token.
    """
    chosen, spans = draw_spans(random, text, mode, most)
    order = random.permutation(len(spans)) if shuffle else None
    blocked = None
    if block and MODES[chosen][0] is draw_tokens:
        blocked = random.random(int((spans[:, 1] - spans[:, 0]).sum())) < block
    return infill(text.ids, spans, MODES[chosen][1](marks), marks, order, blocked)
