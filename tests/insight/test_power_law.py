"""Power laws, against scipy and known curves."""

from __future__ import annotations

import numpy as np
from scipy.optimize import curve_fit

from graftkit.insight.power_law import fit

ROWS = np.array([100.0, 200, 400, 800, 1600])


def test_a_known_law_is_found():
    law = fit(ROWS, (0.05 + 2 * ROWS**-0.4)[None])
    assert abs(law(3200)[0] - (0.05 + 2 * 3200**-0.4)) < 2e-3
    assert abs(law.exponent[0] - 0.4) < 0.03


def test_fits_are_those_of_scipy():
    errors = 0.08 + 1.5 * ROWS**-0.5 + np.random.default_rng(0).normal(0, 0.003, (3, 5))
    law = fit(ROWS, errors)
    for i, one in enumerate(errors):
        bounds = ([0, 0, 0.05], [np.inf, np.inf, 2])
        found, _ = curve_fit(
            lambda n, a, b, c: a + b * n**-c, ROWS, one, [0.1, 1, 0.5], bounds=bounds, maxfev=20_000
        )
        theirs = found[0] + found[1] * ROWS ** -found[2]
        ours = law.floor[i] + law.factor[i] * ROWS ** -law.exponent[i]
        assert ((ours - one) ** 2).sum() <= ((theirs - one) ** 2).sum() * 1.05 + 1e-9


def test_a_curve_that_does_not_fall_predicts_its_mean():
    law = fit(ROWS, np.array([[0.2, 0.21, 0.22, 0.23, 0.24], [0.3, 0.3, 0.3, 0.3, 0.3]]))
    assert np.allclose(law(6400), [0.22, 0.3], atol=1e-6)
