"""Methods and tasks on a device that is not the CPU: tests/second_device/everything.py, in a process of its own.

There PyTorch knows one more device for good, after which a process cannot be forked any more, as other tests need.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1] / "second_device" / "everything.py"


def test_every_tensor_is_made_where_the_model_is() -> None:
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=TESTS.parents[2])
    assert done.returncode == 0, done.stdout
