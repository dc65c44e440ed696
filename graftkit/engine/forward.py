"""The plain forward pass of a batch: with autocast, and with the graft disabled if a loss needs that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graftkit.backbone.walk import modules_of
from graftkit.data.source import Batch
from graftkit.engine.filling import Filled
from graftkit.engine.frozen import Phase
from graftkit.engine.precision import autocast
from graftkit.errors import UserError
from graftkit.grafts.graft import Graft


class Forward:
    """The plain forward pass: the model outputs from which a task computes its loss and outcomes."""

    def __init__(self, graft: Graft, device: torch.device, precision: str, *, finished: bool = False) -> None:
        """`finished`: the graft is not being trained, so outputs of NaN are an error of its folder or the model's."""
        self.graft = graft
        self.finished = finished
        self.device = device
        self.precision = precision

    def __call__(self, batch: Batch) -> Tensor:
        with autocast(self.device, self.precision):
            outputs = batch.source.call(self.graft.model, batch)
        if self.finished and outputs.isnan().any():
            raise UserError(
                f"{self.graft.backbone.source} with this graft gives NaN instead of numbers: values of the model, of the "
                "graft or of its options, such as alpha, are not finite or too large. Restore both from copies."
            )
        return outputs

    @property
    def filled(self) -> Filled | None:
        """What filling the cache took; None without one."""
        return None

    @property
    def light(self) -> bool:
        """Whether a batch is made in less time than it takes to ask another thread for it."""
        return False

    def prepare(self, batch: Batch) -> None:
        """Make what the pass of a batch needs ahead of it, in another thread."""
        batch.prepare(self.reads_inputs)

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
    modes = [(module, module.training) for module in modules_of(model).values()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
