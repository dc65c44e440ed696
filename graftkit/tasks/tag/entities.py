"""Entities as tags of words and as chunks, and their precision, recall and F1 as computed by conlleval.

A chunk is a run of words of one type: (start, end, type), end exclusive. Tags in the schemes BIO, IOB1, BIOES, BILOU and
BMES are converted to chunks, and chunks to BIO.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from graftkit.tasks.shared.by_row import ratio
from graftkit.tasks.shared.metrics import RESAMPLES, interval

Chunk = tuple[int, int, str]
PREFIXES = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S", "M": "I"}
SCHEMES = {"E": "BIOES", "S": "BIOES", "M": "BMES", "L": "BILOU", "U": "BILOU"}


@functools.lru_cache(maxsize=4096)
def parse_tag(tag: str) -> tuple[str, str] | None:
    """Return ('B', 'person') for 'B-person', ('O', '') for 'O', and None for anything but an entity tag."""
    if tag == "O":
        return "O", ""
    prefix, dash, kind = tag.partition("-")
    if prefix not in PREFIXES or bool(dash) != bool(kind):
        return None
    return PREFIXES[prefix], kind


def are_of_entities(tags: Sequence[str]) -> bool:
    """Return whether a set of tags marks entities: some begin with B- or I-, or S- and U- occur together with O."""
    named = [tag for tag in tags if tag[1:2] == "-" and len(tag) > 2]
    if any(tag[0] in "BI" for tag in named):
        return True
    bare = {tag for tag in tags if tag in ("B", "I", "O")}
    return "O" in tags and (any(tag[0] in "SU" for tag in named) or ("B" in bare and len(set(tags)) <= 3))


def chunks(tags: Sequence[str]) -> list[Chunk]:
    """Return the entities in a sequence of tags by the rules of conlleval: B begins one, and so does any other tag except
    O after O, after an end, or after another type. Source: Tjong Kim Sang and Buchholz, 2000, conlleval.pl, startOfChunk
    and endOfChunk; E and S as in seqeval.
    """
    found: list[Chunk] = []
    start, before, type_before = 0, "O", ""
    for place, tag in enumerate(tags):
        prefix, kind = parse_tag(tag) or ("O", "")
        begins = prefix != "O" and (prefix in "BS" or before in "OES" or kind != type_before)
        if before != "O" and (begins or prefix == "O"):
            found.append((start, place, type_before))
        if begins:
            start = place
        before, type_before = prefix, kind
    if before != "O":
        found.append((start, len(tags), type_before))
    return found


def bio(found: Sequence[Chunk], words: int) -> list[str]:
    """Return the BIO tags of chunks that do not overlap."""
    tags = ["O"] * words
    for start, end, kind in found:
        tags[start] = join("B", kind)
        tags[start + 1 : end] = [join("I", kind)] * (end - start - 1)
    return tags


def join(prefix: str, kind: str) -> str:
    return f"{prefix}-{kind}" if kind else prefix


def names_of(types: Sequence[str]) -> tuple[str, ...]:
    """Return the BIO tags of these entity types, which are the classes of the model."""
    return ("O", *(join(prefix, kind) for kind in types for prefix in "BI"))


def types_of(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the types of BIO tags; empty if the labels are not BIO tags."""
    if not labels or labels[0] != "O" or len(labels) % 2 == 0:
        return ()
    types = tuple("" if label == "B" else label[2:] for label in labels[1::2])
    return types if names_of(types) == tuple(labels) else ()


def by_tag(weights: Any, labels: Sequence[str]) -> Any:
    """Expand weights per type or tag to weights per tag: a type's weight applies to its B- and I- tags, unless these have
    their own."""
    if not isinstance(weights, dict):
        return weights
    types = types_of(labels)
    found = {
        join(prefix, kind): weights[kind] for kind in types if kind and kind in weights for prefix in "BI"
    }
    return found | {tag: weight for tag, weight in weights.items() if tag not in types or not tag}


def scheme_of(sentences: Sequence[Sequence[str]]) -> str:
    """Return the tagging scheme of sentences, for display: 'BIO', 'IOB1', 'BIOES', 'BILOU' or 'BMES'."""
    tags = {tag for sentence in sentences for tag in sentence}
    special = [SCHEMES[tag[0]] for tag in tags if tag != "O" and tag[:1] in SCHEMES]
    for scheme in ("BMES", "BILOU", "BIOES"):
        if scheme in special:
            return scheme
    needless = False  # a B where IOB1 would have I
    started_by_i = False
    for sentence in sentences:
        before = ("O", "")
        for tag in sentence:
            prefix, kind = parse_tag(tag) or ("O", "")
            goes_on = before[0] != "O" and before[1] == kind
            needless |= prefix == "B" and not goes_on
            started_by_i |= prefix == "I" and not goes_on
            before = prefix, kind
    return "IOB1" if started_by_i and not needless else "BIO"


def entity_scores(
    wanted: Sequence[Sequence[Chunk]],
    found: Sequence[Sequence[Chunk]],
    types: Sequence[str],
    intervals: bool = True,
) -> dict[str, Any]:
    """Compute precision, recall and F1 over all entities (`f1`) and by type, the mean F1 over types that occur
    (`macro_f1`), and 95% intervals over resamples of the sentences. An entity is correct if its first word, last word and
    type are.
    """
    places = {kind: i for i, kind in enumerate(types)}
    counts = np.zeros((len(wanted), 3, len(types)), dtype=np.int64)  # right, found, wanted
    for i, (gold, guess) in enumerate(zip(wanted, found)):
        for row, group in enumerate((set(gold) & set(guess), guess, gold)):
            for _, _, kind in group:
                counts[i, row, places[kind]] += 1
    totals = counts.sum(axis=0)
    precision, recall, f1 = rates(*totals.sum(axis=1))
    whole, by_type = (
        _resampled(part, intervals) for part in (counts.sum(axis=2), counts.reshape(len(counts), -1))
    )
    by_type = by_type.reshape(len(by_type), 3, len(types)).swapaxes(0, 1)
    return {
        "f1": float(f1),
        **interval("f1", rates(*whole.T)[2]),
        "precision": float(precision),
        "recall": float(recall),
        "macro_f1": float(macro_f1(*totals)),
        **interval("macro_f1", macro_f1(*by_type)),
        "entities": int(totals[2].sum()),
        "per_class": by_class(types, *totals),
    }


def tag_scores(
    wanted: Sequence[np.ndarray], found: Sequence[np.ndarray], labels: Sequence[str], intervals: bool = True
) -> dict[str, Any]:
    """Compute the same for independent tags, given as indices into `labels` for each sentence (words,)."""
    counts = np.zeros((len(wanted), 3, len(labels)), dtype=np.int64)
    for i, (gold, guess) in enumerate(zip(wanted, found)):
        for row, group in enumerate((gold[gold == guess], guess, gold)):
            counts[i, row] = np.bincount(group, minlength=len(labels))
    totals = counts.sum(axis=0)
    drawn = _resampled(counts.reshape(len(counts), -1), intervals).reshape(-1, 3, len(labels)).swapaxes(0, 1)
    return {
        "macro_f1": float(macro_f1(*totals)),
        **interval("macro_f1", macro_f1(*drawn)),
        "per_class": by_class(labels, *totals),
    }


def by_sentence(
    wanted: Sequence[np.ndarray], found: Sequence[np.ndarray], labels: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return accuracy, and for entities precision, recall and F1, by sentence (`ByRow.by_row`); tags are indices into
    `labels`."""
    words = [len(gold) for gold in wanted]
    made = {"accuracy": ratio([(guess == gold).sum() for gold, guess in zip(wanted, found)], words)}
    if not types_of(labels):
        return made
    golds, guesses = ([set(chunks([labels[i] for i in row])) for row in rows] for rows in (wanted, found))
    right = np.array([len(gold & guess) for gold, guess in zip(golds, guesses)])
    given, expected = np.array([len(one) for one in guesses]), np.array([len(one) for one in golds])
    f1 = ratio(2 * right, given + expected)
    return made | {"f1": f1, "precision": ratio(right, given), "recall": ratio(right, expected)}


def accuracy_of(right: np.ndarray, words: np.ndarray, intervals: bool = True) -> dict[str, Any]:
    """Return the share of correct words with its interval; `right` and `words` are counts (sentences,)."""
    drawn = _resampled(np.stack([right, words], axis=1), intervals)
    return {
        "accuracy": float(right.sum() / words.sum()),
        **interval("accuracy", drawn[:, 0] / drawn[:, 1]),
    }


def rates(right: Any, found: Any, wanted: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1 from counts; 0 where the denominator is 0."""
    right = np.asarray(right, dtype=np.float64)
    total = np.asarray(found) + np.asarray(wanted)
    return tuple(
        np.divide(part, whole, out=np.zeros_like(right), where=np.asarray(whole) > 0)
        for part, whole in ((right, found), (right, wanted), (2 * right, total))
    )  # type: ignore[return-value]


def macro_f1(right: np.ndarray, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the mean F1 over the classes (..., classes) that occur in targets or predictions; 0 if none does."""
    there = (found + wanted) > 0
    return rates(right, found, wanted)[2].sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)


def by_class(
    names: Sequence[str], right: np.ndarray, found: np.ndarray, wanted: np.ndarray
) -> dict[str, dict[str, Any]]:
    precision, recall, f1 = rates(right, found, wanted)
    return {
        name or "entity": {
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "rows": int(wanted[i]),
        }
        for i, name in enumerate(names)
    }


def _resampled(counts: np.ndarray, intervals: bool, seed: int = 0) -> np.ndarray:
    """Return sums of `counts` (sentences, numbers) over 1,000 resamples of the sentences, (1000, numbers); (0, numbers)
    without `intervals`.

    Sentences with the same counts form one cell of a multinomial draw.
    """
    if not intervals:
        return np.empty((0, counts.shape[1]), dtype=np.int64)
    cells, sizes = np.unique(counts, axis=0, return_counts=True)
    random, shares = np.random.default_rng(seed), sizes / len(counts)
    sums = np.empty((RESAMPLES, counts.shape[1]), dtype=np.int64)
    for i in range(RESAMPLES):
        sums[i] = random.multinomial(len(counts), shares) @ cells
    return sums
