"""How an error falls with the number of rows: a power law with a floor, fitted to a learning curve.

    error(n) = a + b n^-c,   a, b >= 0

Hestness et al. 2017, "Deep Learning Scaling is Predictable, Empirically", section 3; for curves of single tasks: Viering and
Loog 2022, "The Shape of Learning Curves: a Review".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXPONENTS = np.geomspace(0.05, 2.0, 60)
FEWEST = 3  # points


@dataclass(frozen=True)
class PowerLaw:
    """Fitted curves; each number is an array (curves,)."""

    floor: np.ndarray
    factor: np.ndarray
    exponent: np.ndarray

    def __call__(self, rows: float) -> np.ndarray:
        """Return the error at a number of rows, (curves,)."""
        return self.floor + self.factor * rows**-self.exponent


def fit(rows: np.ndarray, errors: np.ndarray) -> PowerLaw:
    """Return the least-squares power laws of errors (curves, points) at numbers of rows (points,), at least three.

    For each exponent of a grid, floor and factor are a linear problem with two non-negative unknowns.
    """
    assert errors.shape[1] == len(rows) >= FEWEST
    best = np.full(len(errors), np.inf)
    floor, factor, exponent = (np.zeros(len(errors)) for _ in range(3))
    top = rows.max()
    for power in EXPONENTS:
        x = (rows / top) ** -power  # (points,), 1 at the most rows
        a, b = _line(x, errors)
        off = ((errors - a[:, None] - b[:, None] * x) ** 2).sum(axis=1)
        better = off < best - 1e-15
        best[better], floor[better], exponent[better] = off[better], a[better], power
        factor[better] = b[better] * top**power
    return PowerLaw(floor, factor, exponent)


def _line(x: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least-squares a, b >= 0 of a + b x, each (curves,)."""
    middle, mean = x.mean(), errors.mean(axis=1)
    b = (errors - mean[:, None]) @ (x - middle) / ((x - middle) ** 2).sum()
    a = mean - b * middle
    through = np.maximum(errors @ x / (x @ x), 0)  # with a = 0
    a, b = np.where(a < 0, 0.0, a), np.where(a < 0, through, b)
    return np.where(b < 0, np.maximum(mean, 0), a), np.maximum(b, 0)
