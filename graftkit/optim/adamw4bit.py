"""AdamW with moments in 4 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graftkit.optim.base import Optimizer, ParamGroup
from graftkit.optim.shared.lowbit import QuantizedAdamW
from graftkit.optim.shared.moments import moment_bytes
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class AdamW4bit(Optimizer):
    """AdamW whose two moments are stored in 4 bits each, in blocks of 128 numbers with a scale of their own.

    Li et al. 2023, 'Memory Efficient Optimizers with 4-bit States': the mean of gradients uses the dynamic code, the mean of
    squared gradients 16 evenly spaced values without zero. Both are scaled by block, as in torchao; the paper scales the
    second moment of matrices by row and column, which is a little more accurate. Moments of tensors with fewer than 4,096
    elements (norms, biases) stay in fp32.

    When: `adamw8bit()` still takes too much memory. Learning rates are those of AdamW.
    Memory: 1.06 bytes for each trained parameter, instead of 8.
    """

    steps_in_backward: ClassVar[bool] = True
    BITS: ClassVar[int] = 4

    beta1: float = option(0.9, "decay of the mean of gradients", at_least=0, below=1)
    beta2: float = option(0.999, "decay of the mean of squared gradients", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator", above=0)

    def make(self, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        return QuantizedAdamW(groups, (self.beta1, self.beta2), self.eps, self.BITS)

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of indices and scales, or of moments in fp32 for a small tensor, whatever the dtype."""
        return moment_bytes(math.prod(shape), self.BITS)
