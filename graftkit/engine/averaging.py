"""An exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """A shadow A of the trained parameters W, updated after each step: A <- d A + (1 - d) W.

    Averages of the iterates (Polyak and Juditsky 1992, 'Acceleration of Stochastic Approximation by Averaging') in the form
    of Tarvainen and Valpola 2017, 'Mean teachers are better role models'. After step t, d = min(decay, (1 + t) / (10 + t)),
    as in TensorFlow's `ExponentialMovingAverage`, so that a short run is not dominated by its initial values. `values`:
    in fp32, on the device of each parameter, since 1 - decay is below the precision of bf16.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.values: dict[str, Tensor] = {}
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the present values."""
        self.values = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the values after step number `step`, from 1. Nothing is read back."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter.to(torch.float32), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute with the averages inside a `with` block. No value is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def keep(self) -> None:
        """Replace the parameters by their averages for good."""
        self._swap()
        self.values = {}

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.values[name] = self.values[name], parameter.data
