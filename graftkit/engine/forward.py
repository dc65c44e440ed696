"""The model called on a batch as it is: autocast, and the graft switched off where a loss asks for that."""

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
    """What the task's loss and outcomes are computed from, of a batch: the model called as it is."""

    def __init__(self, graft: Graft, device: torch.device, precision: str) -> None:
        self.graft = graft
        self.device = device
        self.precision = precision

    def __call__(self, batch: Batch) -> Tensor:
        with autocast(self.device, self.precision):
            return batch.source.call(self.graft.model, batch)

    @property
    def reads_inputs(self) -> bool:
        """Whether `Batch.inputs` are needed: they are not where a pass starts from cached activations."""
        return True

    @torch.no_grad()
    def base(self, batch: Batch) -> Tensor:
        """Outputs of the model with the graft switched off, in eval mode."""
        with evaluating(self.graft.model), self.graft.disabled(), autocast(self.device, self.precision):
            return batch.source.call(self.graft.model, batch)

    def enter(self, phase: Phase) -> None:
        """Told by the loop where other parameters are trained from now on; for most methods there is one phase."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode, and afterwards in the modes that they had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
