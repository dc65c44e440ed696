"""Gradients in fp16: a loss that is scaled up, so that small gradients do not become zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftkit.engine.updates import AfterBackward

FIRST, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000  # those of torch.amp.GradScaler


class Scaled(AfterBackward):
    """Steps after the backward pass of a scaled loss (Micikevicius et al. 2018, 'Mixed Precision Training', section 3.2).

    Where gradients overflow, the scale is halved and the same step is computed again, so that no rows are passed over;
    with a scale of 1 they are what they are, and the loop stops. After 2,000 steps without an overflow the scale is
    doubled, as by torch's `GradScaler`. The scale is a power of two, so scaling itself rounds nothing. Whether gradients
    overflow is read back in each step.
    """

    scale, good, repeated = FIRST, 0, 0

    def backward(self, loss: Tensor, last: bool = True) -> None:
        (loss * self.scale).backward()

    def fits(self) -> bool:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        finite = torch.stack([g.sum(dtype=torch.float32) * 0 for g in gradients]).sum() if gradients else None
        if finite is not None and not torch.isfinite(finite).item() and self.scale > 1:
            self.scale, self.good, self.repeated = self.scale * BACKOFF, 0, self.repeated + 1
            return False
        for gradient in gradients:
            gradient.mul_(1 / self.scale)
        self.good += 1
        if self.good >= INTERVAL:
            self.scale, self.good = self.scale * GROWTH, 0
        return True

    @property
    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good": self.good, "repeated": self.repeated}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            self.scale, self.good, self.repeated = state["scale"], state["good"], state["repeated"]
