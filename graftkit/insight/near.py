"""Rows that are near one another, and rows that are far from all others, by their features."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.data.images import Picture
from graftkit.data.sounds import Sound
from graftkit.insight.knn import nearest, unit

NEIGHBOURS = 10
# Two rows are near duplicates above this cosine, if their inputs agree too. Of pairs of texts of banking77 above both limits,
# all but a few differ in case, punctuation, a typo or one word.
COSINE = 0.9
TRIGRAMS = 0.8
HASH_BITS = 4  # of 64 in which the difference hashes of two images may differ
LENGTH = 0.02  # by which the lengths of two sounds may differ
SOUND_COSINE = 0.995
FAR = 3.5  # modified z-score beyond which a row is an outlier: Iglewicz and Hoaglin 1993


@dataclass(frozen=True)
class Neighbours:
    """The nearest of some rows to each of others. `rows` (asked, k): the nearest first; `cosines` (asked, k)."""

    rows: np.ndarray
    cosines: np.ndarray


def centred(values: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return features (rows, width) minus their `mean` over the training rows (width,), each of length 1.

    Without the mean, all texts are near one another for many models, which have a direction in common.
    """
    return unit(values - mean)


def neighbours(asked: np.ndarray, known: np.ndarray, k: int = NEIGHBOURS, itself: bool = False) -> Neighbours:
    """Return the `k` rows of `known` (rows, width) that are nearest to each of `asked`, both of length 1, by cosine.

    `itself`: both are the same rows, and no row is a neighbour of its own. All pairs are compared, in blocks.
    """
    rows, cosines = nearest(asked, known, k, themselves=itself)
    return Neighbours(rows, cosines.clip(-1, 1))


def near_pairs(found: Neighbours, asked: Sequence[Any], known: Sequence[Any]) -> list[tuple[int, int, float]]:
    """Return (row of `asked`, row of `known`, cosine) of the pairs of neighbours whose inputs are nearly the same."""
    rows, places = np.nonzero(found.cosines >= COSINE)
    pairs = [
        (int(row), int(found.rows[row, place]), float(found.cosines[row, place]))
        for row, place in zip(rows, places)
    ]
    return [pair for pair in pairs if alike(asked[pair[0]], known[pair[1]], pair[2])]


def alike(left: Any, right: Any, cosine: float) -> bool:
    """Return whether two inputs with near features are nearly the same themselves.

    Texts: four fifths of the sequences of three letters in either are in both. Images: difference hashes of 64 bits differ
    in at most 4. Recordings: equally long within 2%, with a cosine of at least 0.995. A list of inputs: each of them.
    """
    if isinstance(left, tuple):
        return all(alike(a, b, cosine) for a, b in zip(left, right))
    if isinstance(left, str):
        a, b = trigrams(left), trigrams(right)
        return len(a & b) >= TRIGRAMS * len(a | b)
    if isinstance(left, Picture):
        return bin(difference_hash(left) ^ difference_hash(right)).count("1") <= HASH_BITS
    if isinstance(left, Sound):
        lengths = left.samples / left.rate, right.samples / right.rate
        return cosine >= SOUND_COSINE and abs(lengths[0] - lengths[1]) <= LENGTH * max(lengths)
    return False


def trigrams(text: str) -> set[str]:
    """Return the sequences of three characters of a text, whatever its case, punctuation and blanks."""
    words = " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
    words = f" {words} "
    return {words[at : at + 3] for at in range(max(1, len(words) - 2))}


def difference_hash(picture: Picture) -> int:
    """Return 64 bits: whether each of 9 x 8 grey pixels is brighter than the one to its right."""
    from graftkit.data.images import load

    (grey,) = load([picture], lambda image, _: np.asarray(image.convert("L").resize((9, 8)), np.int16))
    return int("".join("1" if bit else "0" for bit in (grey[:, :-1] > grey[:, 1:]).ravel()), 2)


def outliers(found: Neighbours) -> list[tuple[int, float]]:
    """Return (row, distance) of rows that are far from all others, the farthest first.

    The distance is 1 minus the mean cosine to the neighbours. Those above the median by 3.5 standard deviations, estimated
    as 1.4826 times the median absolute deviation, are far (Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers").
    """
    distances = 1 - found.cosines.mean(1)
    middle = float(np.median(distances))
    spread = 1.4826 * float(np.median(np.abs(distances - middle)))
    limit = middle + FAR * max(spread, 1e-6)
    far = np.flatnonzero(distances > limit)
    return [(int(row), float(distances[row])) for row in far[np.argsort(-distances[far], kind="stable")]]
