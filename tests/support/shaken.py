"""What the tests of methods share: grafts with random values, their size, and the message of a refusal."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from graftkit import UserError, attach

ALL_KINDS = pytest.mark.parametrize("kind", tiny.KINDS)


def shaken(model: nn.Module, text: str, name: str = "default", seed: int = 5):
    """A graft with random values in all that it trains."""
    graft = attach(model, text, name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return graft


def count(graft) -> int:
    return sum(p.numel() for p in graft.parameters.values())


def message(model: nn.Module, text: str, **more) -> str:
    with pytest.raises(UserError) as caught:
        attach(model, text, **more)
    return str(caught.value)
