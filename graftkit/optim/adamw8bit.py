"""AdamW with moments in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftkit.optim.shared.lowbit import LowBitAdamW


@dataclass(frozen=True)
class AdamW8bit(LowBitAdamW):
    """AdamW whose two moments are stored in 8 bits each, in blocks of 256 numbers with a scale of their own.

    Dettmers et al. 2022, '8-bit Optimizers via Block-wise Quantization': both moments use the dynamic code, which spends more
    bits on the exponent of small numbers and more on the fraction of large ones; a step itself computes in fp32. Moments
    of tensors with fewer than 4,096 elements (norms, biases) stay in fp32, as in bitsandbytes. This is plain PyTorch, and
    runs on CPUs and GPUs.

    When: all weights are trained and Adam's state is too large. Learning rates are those of AdamW.
    Memory: 2.03 bytes for each trained parameter, instead of 8.
    """

    BITS: ClassVar[int] = 8
