"""AdamW with moments in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftkit.optim.shared.lowbit import LowBitAdamW


@dataclass(frozen=True)
class AdamW4bit(LowBitAdamW):
    """AdamW whose two moments are stored in 4 bits each, in blocks of 128 numbers with a scale of their own.

    Li et al. 2023, 'Memory Efficient Optimizers with 4-bit States': the mean of gradients uses the dynamic code, the mean of
    squared gradients 16 evenly spaced values without zero. Both are scaled by block, as in torchao; the paper scales the
    second moment of matrices by row and column, which is a little more accurate. Moments of tensors with fewer than 4,096
    elements (norms, biases) stay in fp32.

    When: `adamw8bit()` still takes too much memory. Learning rates are those of AdamW.
    Memory: 1.06 bytes for each trained parameter, instead of 8.
    """

    BITS: ClassVar[int] = 4
