"""Which tokens of a row are masked, and what stands in their place. Pure functions of a random generator."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.errors import UserError
from graftkit.recipe.catalogue import option

EVALUATED = 0.15  # share of the tokens that are masked in every evaluation
SPAN_ENDS, LONGEST_SPAN = (
    0.2,
    10,
)  # geometric distribution of span lengths (SpanBERT, Joshi et al. 2020, section 3.1)
KEPT, RANDOM = (
    0.1,
    0.1,
)  # of the chosen tokens, which stay or are replaced by another token (BERT, section 3.1)


@dataclass(frozen=True)
class Share:
    """The share of masked tokens over a run, linear from `first` to `last`."""

    first: float
    last: float

    def at(self, progress: float) -> float:
        return self.first + (self.last - self.first) * min(1.0, max(0.0, progress))


@dataclass(frozen=True)
class MaskingOptions:
    """The options of all objectives with masked tokens."""

    share: float | str = option(
        0.15, "share of the tokens that are masked; '0.3->0.15': falling linearly over the run"
    )
    replace: str = option(
        "bert",
        "what stands for a masked token: bert: the mask token in 80%, a random token in 10%, itself in 10%; mask: always "
        "the mask token",
        choices=("bert", "mask"),
    )


def parse_share(value: float | str, owner: str) -> Share:
    """Return the share that `0.15` or `'0.3->0.15'` describes. Raises `UserError` for anything else."""
    parts = [value] if not isinstance(value, str) else re.split(r"\s*->\s*", value.strip())
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < 1 for number in numbers):
        raise UserError(
            f"{owner}: share is {value!r}, but must be a number between 0 and 1, such as 0.15, or two for a schedule, as in "
            "'0.3->0.15'."
        )
    return Share(numbers[0], numbers[-1])


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of a tokenizer. `special` (ids,): tokens that are never masked or drawn; `begins` (ids,):
    tokens that begin a word, if that is known."""

    mask: int
    special: np.ndarray
    begins: np.ndarray | None

    @property
    def ordinary(self) -> np.ndarray:
        """The ids that a random replacement is drawn from."""
        return np.flatnonzero(~self.special)


def vocabulary_of(tokenizer: Any, owner: str, words: bool = False) -> Vocabulary:
    """Return what masking needs of a tokenizer. Raises `UserError` if it has no mask token, or if words are asked for and
    its tokens do not tell where one begins."""
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise UserError(
            f"{owner} needs a tokenizer with a mask token, and that of the model has none. Choose a masked language model "
            "such as BERT, train a tokenizer with one, or use the objective causal() for this model."
        )
    size = len(tokenizer)
    special = np.zeros(size, dtype=bool)
    special[[number for number in tokenizer.all_special_ids if number < size]] = True
    return Vocabulary(
        tokenizer.mask_token_id, special, word_begins(tokenizer, special, owner) if words else None
    )


def word_begins(tokenizer: Any, special: np.ndarray, owner: str) -> np.ndarray:
    """Return (ids,) which tokens begin a word: those without '##', or those with the sign of a space before them."""
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(len(special))))]
    within = np.array([token.startswith("##") for token in tokens])
    spaced = np.array([token.startswith(("Ġ", "▁", " ")) for token in tokens])
    if not within.any() and not spaced.any():
        raise UserError(
            f"{owner}: the tokens of this tokenizer do not tell where a word begins (by '##', 'Ġ' or '▁'); use unit='token'."
        )
    return special | (~within if within.any() else spaced)


# (generator, free positions (n,), first position of each word (n,) bool, count) -> positions (count,), groups (count,)
Draw = Callable[[np.random.Generator, np.ndarray, np.ndarray | None, int], tuple[np.ndarray, np.ndarray]]


def draw_tokens(
    random: np.random.Generator, free: np.ndarray, begins: np.ndarray | None, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose `count` of the positions, each alone."""
    chosen = np.sort(random.choice(free, count, replace=False))
    return chosen, np.arange(count)


def draw_words(
    random: np.random.Generator, free: np.ndarray, begins: np.ndarray | None, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose whole words in random order until `count` positions are chosen. A word that does not fit is left out; only if
    none is left that does is one masked in part. Replacements are drawn for each token, as in BERT's whole-word masking."""
    assert begins is not None
    words = np.split(free, np.flatnonzero(begins[1:] | (np.diff(free) > 1)) + 1)
    chosen: list[np.ndarray] = []
    spare: list[np.ndarray] = []
    left = count
    for word in random.permutation(len(words)):
        if not left:
            break
        fits = len(words[word]) <= left
        (chosen if fits else spare).append(words[word])
        left -= len(words[word]) if fits else 0
    if left:
        chosen.append(spare[0][:left])
    return np.sort(np.concatenate(chosen)), np.arange(count)


def draw_spans(
    random: np.random.Generator, free: np.ndarray, begins: np.ndarray | None, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose spans of geometric lengths, with mean 3.8, until `count` positions are chosen; the last is cut. A span that
    meets a masked or special token ends there. The tokens of a span are replaced alike."""
    open_ = np.zeros(int(free[-1]) + 2, dtype=bool)
    open_[free] = True
    groups = np.full(len(open_), -1)
    left, number = count, 0
    while left:
        start = int(random.choice(np.flatnonzero(open_)))
        length = min(int(random.geometric(SPAN_ENDS)), LONGEST_SPAN, left)
        stop = start + 1
        while stop < start + length and open_[stop]:
            stop += 1
        open_[start:stop], groups[start:stop] = False, number
        left, number = left - (stop - start), number + 1
    chosen = np.flatnonzero(groups >= 0)
    return chosen, groups[chosen]


UNITS: dict[str, Draw] = {"token": draw_tokens, "word": draw_words, "span": draw_spans}


def replaced(
    random: np.random.Generator, ids: np.ndarray, groups: np.ndarray, vocabulary: Vocabulary, all_masks: bool
) -> np.ndarray:
    """Return what stands in the place of the chosen tokens `ids` (count,): mask tokens, or 80% mask, 10% random, 10% unchanged.

    Tokens of one group are treated alike. The same numbers are drawn in both cases.
    """
    fate = random.random(int(groups.max()) + 1)[groups]
    others = vocabulary.ordinary
    drawn = others[random.integers(0, len(others), len(ids))]
    if all_masks:
        return np.full_like(ids, vocabulary.mask)
    return np.where(fate < KEPT, ids, np.where(fate < KEPT + RANDOM, drawn, vocabulary.mask))


def masked(
    random: np.random.Generator,
    ids: np.ndarray,
    count: int,
    vocabulary: Vocabulary,
    unit: str,
    all_masks: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a row (length,) with `count` of its tokens masked, and their positions (count,) in order."""
    free = np.flatnonzero(~vocabulary.special[ids])
    if len(free) < count:  # almost only special tokens
        free = np.arange(len(ids))
    begins = None if vocabulary.begins is None else vocabulary.begins[ids[free]]
    places, groups = UNITS[unit](random, free, begins, count)
    made = ids.copy()
    made[places] = replaced(random, ids[places], groups, vocabulary, all_masks)
    return made, places


def edges(tokenizer: Any) -> tuple[int | None, int | None]:
    """Return the tokens that begin and end a row: [CLS] and [SEP], or <s> and </s>; None where there is none."""
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    return first, last
