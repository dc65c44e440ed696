"""Nearest rows by cosine similarity of standardized features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graftkit.insight.probe import standardized
from graftkit.insight.targets import Targets

NEIGHBOURS = 10
TEMPERATURE = 0.07  # of the votes, as in Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
CELLS = 20_000_000  # similarities that are in memory at a time


def directions(features: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """Return standardized features of length 1, (rows, width). `like`: the rows whose mean and standard deviation apply."""
    return unit(standardized(features if like is None else like)(features))


def unit(values: np.ndarray) -> np.ndarray:
    """Return rows (rows, width) of length 1, in fp32."""
    values = values.astype(np.float32, copy=False)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def similarities(given: np.ndarray, among: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the similarities of parts of `given` to all of `among`, both of length 1: rows, and (rows, among)."""
    size = max(1, CELLS // max(1, len(among)))
    for start in range(0, len(given), size):
        rows = slice(start, min(start + size, len(given)))
        yield rows, given[rows] @ among.T


def nearest(
    given: np.ndarray, among: np.ndarray, count: int, *, themselves: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the rows of `among` that are nearest to each of `given`, nearest first, and their cosine
    similarities, both (rows, count). `themselves`: the two are the same rows, and none is its own neighbour."""
    count = min(count, len(among) - themselves)
    rows_of, near = np.empty((len(given), count), np.int64), np.empty((len(given), count), np.float32)
    for rows, found in similarities(given, among):
        if themselves:
            found[np.arange(len(found)), np.arange(rows.start, rows.stop)] = -np.inf
        best = np.argpartition(-found, count - 1, axis=1)[:, :count] if count < found.shape[1] else None
        values = found if best is None else np.take_along_axis(found, best, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        near[rows] = np.take_along_axis(values, order, 1)
        rows_of[rows] = order if best is None else np.take_along_axis(best, order, 1)
    return rows_of, near


def neighbours_vote(features: np.ndarray, targets: Targets) -> np.ndarray:
    """Return what the nearest 10 other rows say of each row, weighted by exp(similarity / 0.07): scores (rows, columns)."""
    unit = directions(features)
    rows, near = nearest(unit, unit, NEIGHBOURS, themselves=True)
    weights = np.exp((near - near[:, :1]) / TEMPERATURE)
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("rn,rnc->rc", weights, targets.table[rows])
