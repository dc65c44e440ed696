"""Which rows to label next: uncertain, typical of rows that are uncertain, and unlike those that are labelled or chosen."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graftkit.insight.knn import similarities

GROUND = 3000  # rows of the pool that the chosen rows are to represent; a sample of larger pools
MOST = 20_000  # rows of the pool that may be chosen; the most uncertain of larger pools
POWER = 2.0  # of a row's own uncertainty, chosen on held-out training rows of banking77
ALIKE = 0.95  # cosine similarity from which two rows are near-duplicates


def choose(
    pool: np.ndarray, count: int, uncertainty: np.ndarray | None = None, labelled: np.ndarray | None = None, seed: int = 0
) -> list[int]:  # fmt: skip
    """Return the rows of a pool to label next, best first: at most `count`, fewer if all others are near-duplicates.

    `pool` (rows, width) and `labelled` (rows, width): directions of features, each of length 1. `uncertainty` (rows,), from
    0 to 1, of a model's answers; None if there is no model yet.

    Greedy maximization of a facility location: a set of rows is worth the sum, over the rows of the pool, of their uncertainty
    times their similarity to the nearest row that is labelled or in the set (Wei, Iyer and Bilmes 2015, "Submodularity in Data
    Subset Selection and Active Learning", who maximize it over the most uncertain rows). What a row adds is multiplied by
    its own uncertainty, squared. Without a model all rows count the same, so that the first rows are typical of the
    largest groups of the pool, as in Hacohen, Dekel and Weinshall 2022, "Active Learning on a Budget".
    """
    unsure = np.ones(len(pool)) if uncertainty is None else np.maximum(uncertainty.astype(np.float64), 1e-6)
    draw = np.random.default_rng(seed)
    ground = np.sort(draw.permutation(len(pool))[:GROUND])
    shuffled = draw.permutation(len(pool))
    candidates = np.sort(shuffled[np.argsort(-unsure[shuffled], kind="stable")][:MOST])
    weights = unsure[ground].astype(np.float32)
    own = unsure[candidates] ** POWER
    held = np.zeros((0, pool.shape[1]), pool.dtype) if labelled is None else labelled
    # similarity to the nearest row that is labelled (later on: or chosen), of ground rows and of candidates
    covered, closest = np.zeros(len(ground), np.float32), np.full(len(candidates), -1.0, np.float32)
    for _, found in similarities(held, pool):
        covered = np.maximum(covered, found[:, ground].max(0))
        closest = np.maximum(closest, found[:, candidates].max(0))
    near = np.concatenate([found for _, found in similarities(pool[candidates], pool[ground])])

    gains = np.maximum(near - covered, 0) @ weights * own
    queue = [(-gain, place) for place, gain in enumerate(gains.tolist()) if closest[place] < ALIKE]
    heapq.heapify(
        queue
    )  # what a row adds only shrinks while others are chosen, so old values are upper bounds
    known = np.zeros(len(candidates), np.int64)  # how many were chosen when the gain was computed
    chosen: list[int] = []
    while queue and len(chosen) < count:
        _, place = heapq.heappop(queue)
        row = int(candidates[place])
        if known[place] < len(chosen):
            known[place] = len(chosen)
            if float((pool[chosen] @ pool[row]).max()) < ALIKE:
                gain = float(np.maximum(near[place] - covered, 0) @ weights * own[place])
                heapq.heappush(queue, (-gain, place))
            continue
        chosen.append(row)
        covered = np.maximum(covered, near[place])
    return chosen


def uncertainty_of(answers: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Return how unsure answers are, (rows,), from 0 to 1: one minus the probability of the label, or of a set of labels the
    nearness of the least sure one to 0.5; None for numbers, which have no probability."""
    if all("probability" in answer for answer in answers):
        return np.array([1 - float(answer["probability"]) for answer in answers])
    if all("probabilities" in answer for answer in answers):
        return np.array(
            [1 - min(abs(2 * p - 1) for p in answer["probabilities"].values()) for answer in answers]
        )
    return None
