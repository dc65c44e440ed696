"""Modules, parameters and buffers by name are those of torch, in the same order, however they are shared."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

from graftkit import attach
from graftkit.backbone.walk import buffers_of, modules_of, parameters_of


class Shared(nn.Module):
    """The same module, parameter and buffer at two places each, an empty place, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(2))
        self.first = nn.Linear(3, 3)
        self.inner = nn.Sequential(nn.ReLU(), self.first, nn.BatchNorm1d(3))
        self.nothing = None
        self.register_module("empty", None)
        self.register_parameter("missing", None)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.register_buffer("mean", self.inner[2].running_mean)


@pytest.mark.parametrize("name", ["shared", "t5", "wavlm"])
def test_they_are_those_of_torch(name: str) -> None:
    model = Shared() if name == "shared" else attach(zoo.BY_NAME[name].fresh(), "lora(rank=2)").model
    for got, wanted in (
        (modules_of(model), model.named_modules()),
        (parameters_of(model), model.named_parameters()),
        (buffers_of(model), model.named_buffers()),
    ):
        assert [(key, id(value)) for key, value in got.items()] == [(key, id(value)) for key, value in wanted]
