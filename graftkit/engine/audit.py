"""The gradient audit: what is labelled trains, and nothing else does.

Training that silently changes nothing, or changes what should be frozen, is the worst bug of this field. In
the first two steps of a run each labelled parameter must get a gradient and move, and no other parameter and
no buffer may.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from graftkit.errors import UserError, listing

STEPS = 2  # the first factor of a low-rank pair has no gradient while the second is zero


class Audit:
    """Watches the first two steps of a run."""

    def __init__(self, model: nn.Module, trained: Container[str]) -> None:
        self.model = model
        self.trained = trained
        self.steps = 0
        self.with_gradient: set[str] = set()
        self.still: set[str] = set()
        self.before = {name: digest(tensor) for name, tensor in self._tensors()}

    @property
    def done(self) -> bool:
        return self.steps >= STEPS and not self.still

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.model.named_parameters(), *self.model.named_buffers()]

    def after_backward(self) -> None:
        """Note which parameters have a gradient that is not zero everywhere."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and name not in self.with_gradient and bool(parameter.grad.any()):
                self.with_gradient.add(name)

    def after_step(self, rising: bool = False) -> None:
        """After the second step, raise `UserError` with the names of all parameters that broke the rule.

        `rising`: the learning rate has not reached its height yet. A first step of a long warm-up can be too
        small to change a number near 1, so what has not moved by then is looked at again until the rate is full.
        """
        self.steps += 1
        if self.steps < STEPS:
            return
        if self.steps > STEPS:
            now = dict(self.model.named_parameters())
            self.still = {name for name in self.still if digest(now[name]) == self.before[name]}
            self._stop([] if rising else [_unmoved(self.still)])
            return
        moved = {name for name, tensor in self._tensors() if digest(tensor) != self.before[name]}
        names = {name for name, _ in self.model.named_parameters()}
        labelled = {name for name in names if name in self.trained}
        problems = []
        if silent := sorted(labelled - self.with_gradient):
            problems.append(f"{len(silent)} parameters got no gradient: {listing(silent, 6)}")
        self.still = (labelled & self.with_gradient) - moved
        if not rising:
            problems.append(_unmoved(self.still))
        if leaked := sorted(moved - labelled):
            problems.append(f"{len(leaked)} frozen tensors changed: {listing(leaked, 6)}")
        if stray := sorted((self.with_gradient - labelled) - moved):
            problems.append(f"{len(stray)} frozen parameters got a gradient: {listing(stray, 6)}")
        self._stop(problems)

    def _stop(self, problems: list[str]) -> None:
        if any(problems):
            raise UserError(
                f"the gradient audit failed after {self.steps} steps: {'; '.join(filter(None, problems))}. Take parameters that have no "
                "part in the output out of training with freeze(...), and see that learning rates are not too small."
            )


def _unmoved(names: set[str]) -> str:
    if not names:
        return ""
    return f"{len(names)} parameters got a gradient but did not move: {listing(sorted(names), 6)}"


def digest(tensor: Tensor) -> int:
    """A sum over the tensor's bits that changes when any element does."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() == 0:
        return 0
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if flat.is_complex() or flat.element_size() not in kinds:
        return hash(flat.cpu().numpy().tobytes())
    return int(
        (flat if flat.dtype == torch.bool else flat.view(kinds[flat.element_size()])).sum(dtype=torch.int64)
    )
