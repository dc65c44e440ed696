"""The plain forward pass of a batch: with autocast, and with the graft disabled if a loss needs that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graftkit.data.source import Batch
from graftkit.engine.frozen import Phase
from graftkit.engine.precision import autocast
from graftkit.grafts.graft import Graft


class Forward:
    """The plain forward pass: the model outputs from which a task computes its loss and outcomes."""

    def __init__(self, graft: Graft, device: torch.device, precision: str) -> None:
        self.graft = graft
        self.device = device
        self.precision = precision

    def __call__(self, batch: Batch) -> Tensor:
        with autocast(self.device, self.precision):
            return batch.source.call(self.graft.model, batch)

    @property
    def reads_inputs(self) -> bool:
        """Whether `Batch.inputs` are needed; they may not be if a pass starts from cached activations."""
        return True

    @torch.no_grad()
    def base(self, batch: Batch) -> Tensor:
        """Return the outputs of the model with the graft disabled, in eval mode."""
        with evaluating(self.graft.model), self.graft.disabled(), autocast(self.device, self.precision):
            return batch.source.call(self.graft.model, batch)

    def enter(self, phase: Phase) -> None:
        """Called by the loop when the set of trained parameters changes; most methods have one phase."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode; on exit their previous modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
