"""Methods and tasks on a device that is not the CPU: tests/second_device/everything.py, in a process of its own.

There PyTorch knows one more device for good, after which a process cannot be forked any more, as other tests need.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import forked

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1] / "second_device" / "everything.py"


def test_every_tensor_is_made_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS.parents[2])
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)

    def work() -> None:
        raise SystemExit(int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS)])))

    done = forked(work)
    assert done.status == 0, done.out + done.err
