"""Intervals of metrics and of their differences, by a bootstrap over the evaluated rows and over the seeds of runs.

Each resample draws rows with replacement, the same for all that is compared, so that a row that is hard for two methods
counts for both (the paired bootstrap: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 8; for test
sets: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation"). It then draws the runs of each
method, which differ in their seed, with replacement; as the mean of S drawn runs varies less than that of S new ones, by
(S - 1) / S, its distance from the mean of all is widened by the root of S / (S - 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
BLOCK = 4_000_000  # counts of drawn rows at a time


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone. `values` (runs,): the metric of each. `scores`: the metric by row for each,
    (rows, 2), whose sums have the metric as their ratio; empty if it is no such ratio."""

    values: Sequence[float]
    scores: Sequence[np.ndarray] = ()

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def by_row(self) -> bool:
        """Whether the scores are those of the values."""
        if len(self.scores) != len(self.values):
            return False
        sums = [part.sum(axis=0) for part in self.scores]
        return all(
            below > 0 and math.isclose(above / below, value, rel_tol=1e-5, abs_tol=1e-7)
            for (above, below), value in zip(sums, self.values)
        )


def draws_rows(groups: Sequence[Group]) -> bool:
    """Return whether rows can be drawn: all groups have scores, of the same number of rows."""
    return all(g.by_row for g in groups) and len({len(part) for g in groups for part in g.scores}) == 1


def resampled(groups: Sequence[Group], seed: int = 0, rows: bool = True) -> np.ndarray:
    """Return the mean of each group over its runs in each resample, (groups, 1000). `rows`: draw rows too, where that is
    possible. Runs of groups of one size are drawn together, as their seeds are the same."""
    random = np.random.default_rng(seed)
    drawn = _by_rows(groups, random) if rows and draws_rows(groups) else [
        np.tile(np.asarray(g.values, float), (RESAMPLES, 1)) for g in groups
    ]  # fmt: skip
    picks = random.random((RESAMPLES, max(map(len, (g.values for g in groups)))))
    found = []
    for values in drawn:  # (resamples, runs)
        runs = values.shape[1]
        mean = values.mean(axis=1)
        if runs > 1:
            chosen = np.take_along_axis(values, (picks[:, :runs] * runs).astype(int), axis=1)
            mean = mean + math.sqrt(runs / (runs - 1)) * (chosen.mean(axis=1) - mean)
        found.append(mean)
    return np.stack(found)


def _by_rows(groups: Sequence[Group], random: np.random.Generator) -> list[np.ndarray]:
    """Return the metric of each run on resampled rows: for each group (resamples, runs)."""
    count = len(groups[0].scores[0])
    above, below = (
        np.stack([part[:, side] for group in groups for part in group.scores], axis=1) for side in (0, 1)
    )
    found = np.empty((RESAMPLES, above.shape[1]))
    size = max(1, BLOCK // count)
    for start in range(0, RESAMPLES, size):
        part = slice(start, min(start + size, RESAMPLES))
        drawn = random.multinomial(count, np.full(count, 1 / count), size=part.stop - start).astype(float)
        weights = drawn @ below
        found[part] = np.divide(drawn @ above, weights, out=np.zeros_like(weights), where=weights > 0)
    ends = np.cumsum([len(group.values) for group in groups])[:-1]
    return list(np.split(found, ends, axis=1))


def interval(values: np.ndarray) -> list[float]:
    """Return the 2.5th and 97.5th percentiles."""
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]
