"""Blockwise quantization of optimizer state: 8 or 4 bits for each number, and one fp32 scale for each block.

A tensor is read as a flat row of blocks. Each block is divided by its largest magnitude, the scale, and each number is
stored as the index of the nearest value of a fixed code (Dettmers et al. 2022, '8-bit Optimizers via Block-wise
Quantization', section 2). All functions run on the device of their tensors and read nothing back.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 4096  # smaller tensors are not quantized; bitsandbytes and torchao use the same bound
TINY = 1e-38  # divides a block of zeros


def dynamic_code(bits: int, signed: bool) -> list[float]:
    """Return the 2^bits values of the dynamic code in [-1, 1] or [0, 1], in ascending order.

    A value is +-10^-e (0.1 + fraction): the smaller the exponent e, the more bits are left for the fraction, which divides
    [0.1, 1] evenly (Dettmers 2016, '8-Bit Approximations for Parallelism in Deep Learning', figure 2). Without a sign,
    its bit goes to the fraction (Dettmers et al. 2022, section 2.2). The values 0 and 1 are added.
    """
    values = [0.0, 1.0]
    exponents = bits - 1
    for fraction_bits in range(exponents):
        parts = 2**fraction_bits * (1 if signed else 2)
        size = 10.0 ** (fraction_bits - exponents + 1)
        middles = [size * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        values += middles + ([-middle for middle in middles] if signed else [])
    return sorted(values)


def linear_code(bits: int) -> list[float]:
    """Return 2^bits evenly spaced values in (0, 1]. Zero is not one of them.

    A second moment stored as zero would divide a step by `eps` alone (Li et al. 2023, 'Memory Efficient Optimizers with
    4-bit States', section 4.1).
    """
    return [(index + 1) / 2**bits for index in range(2**bits)]


def even_code(bits: int) -> list[float]:
    """Return 2^bits evenly spaced values from -1 to 1. Zero is not one of them."""
    most = 2**bits - 1
    return [2 * index / most - 1 for index in range(2**bits)]


@dataclass(frozen=True)
class Format:
    """How a tensor is stored: `bits` for each number, blocks of `block` numbers, and the name of the code.

    `code`: 'signed' or 'unsigned' for the dynamic code, 'linear' for the one without zero, 'even' for the
    one with a sign.
    """

    bits: int
    block: int
    code: str

    def bytes(self, count: int) -> int:
        """Return the bytes of `count` numbers: those of the indices and of the scales."""
        return math.ceil(count * self.bits / 8) + math.ceil(count / self.block) * torch.float32.itemsize

    def zeros(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return `count` zeros as indices, uint8 (count * bits / 8,), and scales, fp32 (count / block,), rounded up."""
        indices = torch.zeros(math.ceil(count * self.bits / 8), dtype=torch.uint8, device=device)
        return indices, torch.zeros(math.ceil(count / self.block), device=device)

    def read(self, indices: Tensor, scales: Tensor, count: int) -> Tensor:
        """Return `count` numbers in fp32, (count,)."""
        values = self._values(indices.device)
        if self.bits == 4:
            indices = torch.stack([indices >> 4, indices & 15], dim=1).flatten()
        found = values.index_select(0, indices.int())
        full = len(scales) * self.block
        return (F.pad(found, (0, full - len(found))).view(-1, self.block) * scales[:, None]).view(-1)[:count]

    def write(self, numbers: Tensor, indices: Tensor, scales: Tensor) -> None:
        """Store fp32 numbers (count,) in `indices` and `scales`, which `zeros(count)` made."""
        full = len(scales) * self.block
        blocks = F.pad(numbers, (0, full - len(numbers))).view(-1, self.block)
        torch.amax(blocks.abs(), dim=1, out=scales)
        scaled = (blocks / scales.clamp(min=TINY)[:, None]).view(-1)
        found = _nearest(scaled, *_table(self.bits, self.code, numbers.device))
        if self.bits == 4:
            found = (found[::2] << 4) | found[1::2]
        indices.copy_(found[: len(indices)])

    def _values(self, device: torch.device) -> Tensor:
        return _code(self.bits, self.code, device)


def _nearest(numbers: Tensor, below: Tensor, middle: Tensor) -> Tensor:
    """Return for each fp32 number (count,) the index of the nearest value of a code, uint8 (count,), by its `_table`."""
    heads = (numbers.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    return below.index_select(0, heads).add_((numbers > middle.index_select(0, heads)).view(torch.uint8))


@functools.cache
def _table(bits: int, code: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, by the upper 16 bits of an fp32 number, how many middles between neighbours of a code are less than all such numbers,
    uint8 (65536,), and the one middle that lies among them, or infinity, fp32 (65536,). A search in the middles takes 16 times as
    long on a CPU."""
    values = _code(bits, code, torch.device("cpu"))
    middles = (values[1:] + values[:-1]) / 2
    heads = torch.arange(1 << 16, dtype=torch.int32) << 16
    first, last = heads.view(torch.float32), (heads | 0xFFFF).view(torch.float32)
    last = torch.where(last.isnan(), first, last)  # infinity is alone with those that are no numbers
    below, upto = (torch.bucketize(end(first, last), middles) for end in (torch.minimum, torch.maximum))
    if (upto - below).max() > 1:
        raise ValueError(
            f"the values of the code {code!r} with {bits} bits lie closer than fp32's upper halves"
        )
    among = middles[below.clamp(max=len(middles) - 1)]
    return below.to(device, torch.uint8), torch.where(upto > below, among, math.inf).to(device)


@functools.cache
def _code(bits: int, code: str, device: torch.device) -> Tensor:
    even = {"linear": linear_code, "even": even_code}
    values = even[code](bits) if code in even else dynamic_code(bits, signed=code == "signed")
    return torch.tensor(values, dtype=torch.float32, device=device)
