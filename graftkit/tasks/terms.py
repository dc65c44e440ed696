"""The terms of a loss, and the learner that computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graftkit.data.source import LOSS, Batch


@dataclass(frozen=True)
class Term:
    """One part of a loss on the rows of one batch.

    `losses`: (rows,) in fp32, each summed over the row's units; or their sum (), in which case `by_row` computes them on
    demand, so that a bad row can be named. `correct`: number of correctly predicted units, (rows,) or a sum, if that is
    meaningful. `Source.count` counts the units under the same name. `weight`: weight of this term in the step's loss.
    """

    losses: Tensor
    correct: Tensor | None = None
    weight: float = 1.0
    by_row: Callable[[], Tensor] | None = None

    def each(self) -> Tensor:
        """Return the loss of each row, (rows,)."""
        return self.losses if self.by_row is None else self.by_row()


Terms = Mapping[str, Term]


class Calls(Protocol):
    """The engine's forward function as seen by tasks; it handles autocast and the activation cache."""

    graft: Any
    device: torch.device

    def __call__(self, batch: Batch) -> Tensor:
        """Return the outputs (`Source.call`) of the model with its graft."""
        ...

    def base(self, batch: Batch) -> Tensor:
        """Return the outputs with the graft disabled, in eval mode and without gradients. Needs `Task.needs_base`."""
        ...


Learn = Callable[[Calls, Batch], Terms]


def one_term(loss: Callable[[Tensor, Batch], Term]) -> Learn:
    """Return the learner for a loss with a single term, computed from the outputs of one forward pass."""

    def learn(forward: Calls, batch: Batch) -> Terms:
        return {LOSS: loss(forward(batch), batch)}

    return learn
