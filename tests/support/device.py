"""Where the tests compute: `pytest --device cuda` is the way to choose; the CPU by default."""

from __future__ import annotations

import os

import torch

VARIABLE = "GRAFTKIT_TEST_DEVICE"  # set by conftest.py, so that processes that tests start know it too
DEVICE = torch.device(os.environ.get(VARIABLE, "cpu"))
