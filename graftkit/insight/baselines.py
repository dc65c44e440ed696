"""What needs no model: the most frequent answer, and a bag of words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from graftkit.data.words import words_of
from graftkit.errors import UserError
from graftkit.insight.probe import out_of_fold
from graftkit.insight.targets import Targets

MOST_WORDS = 50_000
SCALE = 10.0  # of rows of length 1, for the penalty that suits standardized features


def most_frequent(targets: Targets) -> np.ndarray:
    """Return the same scores for each row, (rows, columns): the share of each class or label, or the mean number."""
    table = targets.table
    return np.tile(table.mean(0), (len(table), 1))


def bag_of_words(
    texts: Sequence[str], pairs: Sequence[str] | None, targets: Targets, folds: np.ndarray
) -> np.ndarray | None:
    """Return the scores of each row, (rows, columns), by a linear model of TF-IDF of words and pairs of words that was fitted
    to the rows of the other folds; None if the texts have no words.

    Of a pair of texts it reads which words only one of the two has, and which both have.
    """
    rows = np.empty(len(texts), object)
    rows[:] = list(zip(texts, pairs)) if pairs is not None else [(text,) for text in texts]
    try:
        return out_of_fold(rows, targets, folds, _vectorizer)
    except NoWords:
        return None


class NoWords(UserError):
    """The texts have no words that could be counted."""


def _vectorizer(rows: np.ndarray) -> Callable[[np.ndarray], Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        analyzer=_words_and_pairs, sublinear_tf=True, max_features=MOST_WORDS, dtype=np.float32
    )
    try:
        vectorizer.fit([text for row in rows for text in row])
    except ValueError:  # an empty vocabulary
        raise NoWords("the texts have no words") from None

    def change(rows: np.ndarray) -> Any:
        from scipy.sparse import hstack

        parts = [vectorizer.transform([row[place] for row in rows]) for place in range(len(rows[0]))]
        first = parts[0]
        found = first if len(parts) == 1 else hstack([abs(first - parts[1]), first.multiply(parts[1])])
        return found.tocsr() * SCALE

    return change


def _words_and_pairs(text: str) -> list[str]:
    words = words_of(text.lower())
    return words + [f"{first} {second}" for first, second in pairwise(words)]
