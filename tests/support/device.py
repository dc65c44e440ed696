"""Where the tests compute: `pytest --device cuda` is the way to choose; the CPU by default."""

from __future__ import annotations

import os

import torch

VARIABLE = "GRAFTKIT_TEST_DEVICE"  # set by conftest.py, so that processes that tests start know it too
NAME = os.environ.get(VARIABLE, "cpu")
if NAME == "second":  # the CPU in disguise; finds tensors without their device where there is no GPU
    import second_device

    DEVICE = second_device.DEVICE
else:
    DEVICE = torch.device(NAME)
