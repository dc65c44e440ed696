"""Sums and figures of the loss terms of one step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from graftkit.tasks.base import Terms


@dataclass(frozen=True)
class Figures:
    """The figures of one loss term in one step: its mean loss over `units`, and the accuracy, if the task reports it."""

    loss: float
    units: float
    accuracy: float | None


class Sums:
    """Sums over the batches of a step, kept on the device: for each term, its losses, its correct units, and whether
    these are counted. A process without a batch in a step has zeros."""

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64
        zero = torch.zeros((), dtype=kind, device=device)
        self.losses = dict.fromkeys(names, zero)
        self.correct = dict(self.losses)
        self.counted = dict(self.losses)
        self.weights = dict.fromkeys(names, 1.0)

    def add(self, terms: Terms) -> None:
        """Add the terms of one batch; nothing is read back."""
        for name, term in terms.items():
            self.weights[name] = term.weight
            zero = self.losses[name]
            self.losses[name] = zero + term.losses.detach().sum().to(zero)
            if term.correct is not None:
                self.correct[name] = self.correct[name] + term.correct.sum().to(zero)
                self.counted[name] = torch.ones_like(zero)
