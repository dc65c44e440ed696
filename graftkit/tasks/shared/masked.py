"""Cross-entropy over a subset of the classes that differs from row to row."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_cross_entropy(logits: Tensor, targets: Tensor, allowed: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross-entropy over the `allowed` classes (..., classes) of `logits` (..., classes), in the shape of
    `targets`. Label smoothing is spread over the allowed classes only."""
    logs = logits.masked_fill(~allowed, -torch.inf).log_softmax(dim=-1)
    losses = -logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if not label_smoothing:
        return losses
    spread = -logs.masked_fill(~allowed, 0).sum(dim=-1) / allowed.sum(dim=-1)
    return (1 - label_smoothing) * losses + label_smoothing * spread
