"""Hold out rows for evaluation."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import numpy as np

from graftkit.data.order import mixed
from graftkit.errors import UserError


def hold_out(labels: Sequence[object], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split row indices into (train, held out), both sorted and non-empty, deterministically for a seed.

    The split is stratified: about `share` of the rows of each class are held out, and at least one row of each class is
    kept for training. If the labels are not classes (floats, or lists, which are not hashable), rows are drawn regardless
    of label. The number of held-out rows is `share` of all rows, rounded, or fewer if the classes do not allow as many.

    Raises `UserError` if `share` is not between 0 and 1, there are fewer than 2 rows, or every class has only one row.
    """
    if not 0 < share < 1:
        raise UserError(
            f"the share of rows to hold out is {share}. It must be a number between 0 and 1, such as 0.1"
        )
    if len(labels) < 2:
        rows = f"{len(labels)} row{'' if len(labels) == 1 else 's'}"
        raise UserError(f"{rows} cannot be split in two. Give at least 2, or a file for evaluation")
    draw = random.Random(int(seed))
    groups = _groups(labels)
    for group in groups:
        draw.shuffle(group)
    draw.shuffle(groups)

    room = sum(len(group) - 1 for group in groups)
    if not room:
        raise UserError(
            "no row can be held out for evaluation: each class has only one row, which is needed for training. "
            "Set data.eval to a file, or to null to skip evaluation"
        )
    total = min(max(1, round(len(labels) * share)), room)
    counts = [min(int(len(group) * share), len(group) - 1) for group in groups]
    by_remainder = sorted(range(len(groups)), key=lambda at: counts[at] - len(groups[at]) * share)
    while (left := total - sum(counts)) > 0:
        open_groups = [at for at in by_remainder if counts[at] < len(groups[at]) - 1]
        for at in open_groups[:left]:
            counts[at] += 1
    held = sorted(row for group, count in zip(groups, counts) for row in group[:count])
    kept = set(range(len(labels))).difference(held)
    return sorted(kept), held


def draw_rows(labels: Sequence[object], count: int, seed: int) -> list[int]:
    """Return `count` row indices, sorted: a random draw in which each class has about its share of the rows.

    With one seed, a smaller draw is part of a larger one. The first row of each class comes before the second of any.
    """
    draw = random.Random(int(seed) + 1)
    places = [
        (place / len(group), draw.random(), row)
        for group in _shuffled(labels, seed)
        for place, row in enumerate(group)
    ]
    return sorted(row for _, _, row in sorted(places)[:count])


def draw_per_class(labels: Sequence[object], count: int, seed: int) -> list[int]:
    """Return the indices of `count` random rows of each class, sorted. With one seed, fewer are part of more."""
    return sorted(row for group in _shuffled(labels, seed) for row in group[:count])


def _shuffled(labels: Sequence[object], seed: int) -> list[list[int]]:
    """Return the row indices of each class in random order."""
    draw, groups = random.Random(int(seed)), _groups(labels)
    for group in groups:
        draw.shuffle(group)
    return groups


def _groups(labels: Sequence[object]) -> list[list[int]]:
    """Group row indices by label, or put them all in one group if the labels are not classes."""
    if not all(isinstance(label, Hashable) and not isinstance(label, float) for label in labels):
        return [list(range(len(labels)))]
    groups: dict[object, list[int]] = {}
    for row, label in enumerate(labels):
        groups.setdefault(label, []).append(row)
    return list(groups.values())


def held_out(documents: int, share: float, seed: int) -> np.ndarray:
    """Return (documents,) which documents of a corpus are held out, at least one and not all.

    Whether a document is held out depends on the seed and its number alone, so appending documents to a corpus moves
    none from one side to the other. Raises `UserError` if there are fewer than 2.
    """
    if documents < 2:
        raise UserError(
            f"the corpus has {documents} document{'s' * (documents != 1)}, so none can be held out for evaluation. Name a "
            "file with data.eval, set data.eval=null, or split it differently: documents='paragraphs' or 'lines' of the "
            "objective"
        )
    start = mixed(np.array([seed], dtype=np.uint64))
    draws = mixed(np.arange(1, documents + 1, dtype=np.uint64) + start)
    held = draws < np.uint64(int(share * 2.0**64))
    if held.all() or not held.any():
        held[draws.argmax() if held.all() else draws.argmin()] ^= True
    return held
