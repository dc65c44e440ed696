"""Models of transformers are imported without scipy.optimize, and get it when they call it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from graftkit.libraries import without_scipy
with without_scipy():
    from transformers.loss import loss_for_object_detection as losses
assert "scipy.optimize" not in sys.modules
cost = [[4, 1, 3], [2, 0, 5], [3, 2, 2]]
rows, columns = losses.linear_sum_assignment(cost, maximize=True)
assert columns.tolist() == [0, 2, 1], columns
import scipy.optimize
assert scipy.optimize.linear_sum_assignment is not losses.linear_sum_assignment
assert callable(scipy.optimize.minimize)
with without_scipy():
    assert scipy.optimize is sys.modules["scipy.optimize"]
del sys.modules["scipy.optimize"]
with without_scipy():
    from scipy.optimize import minimize  # somebody else, at the same time
assert minimize.__module__.startswith("scipy.optimize")
"""


@pytest.mark.slow
def test_scipy_is_imported_when_it_is_called():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
