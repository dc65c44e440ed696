"""Intervals over rows and seeds, against formulas."""

from __future__ import annotations

import math

import numpy as np

from graftkit.insight.paired import Group, draws_rows, interval, resampled


def group(*runs: np.ndarray) -> Group:
    scores = [np.stack([run.astype(float), np.ones(len(run))], axis=1) for run in runs]
    return Group([float(run.mean()) for run in runs], scores)


def test_rows_are_drawn_as_the_normal_approximation_says():
    random = np.random.default_rng(0)
    right = random.random(2000) < 0.8
    low, high = interval(resampled([group(right)])[0])
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 2000)
    assert math.isclose(low, right.mean() - half, abs_tol=0.003)
    assert math.isclose(high, right.mean() + half, abs_tol=0.003)


def test_differences_are_of_the_same_rows():
    """The variance of a paired difference is that of the differences by row (McNemar 1947)."""
    random = np.random.default_rng(1)
    one = random.random(3000) < 0.7
    other = np.where(random.random(3000) < 0.02, ~one, one)  # they differ in few rows
    drawn = resampled([group(one), group(other)])
    error = (one.astype(float) - other).std() / math.sqrt(3000)
    assert math.isclose((drawn[0] - drawn[1]).std(), error, rel_tol=0.1)
    assert drawn[0].std() > 3 * error


def test_seeds_vary_as_the_standard_error_of_their_mean():
    values = [0.71, 0.74, 0.69, 0.75]
    drawn = resampled([Group(values)])[0]
    assert math.isclose(drawn.std(), np.std(values, ddof=1) / 2, rel_tol=0.1)
    assert resampled([Group([0.5])])[0].std() == 0


def test_scores_that_are_not_of_the_metric_are_left_alone():
    good = group(np.array([1, 0, 1, 1]))
    other = Group([0.5], good.scores)
    assert draws_rows([good]) and not draws_rows([good, other])
    assert not draws_rows([good, group(np.array([1, 0, 1]))])
    assert (resampled([other])[0] == 0.5).all()
