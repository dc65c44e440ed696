"""Adam's two moments of a parameter: in fp32, or quantized by blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from graftkit.optim.shared.blockwise import SMALLEST, Format

# the formats of the mean of gradients and of the mean of squared gradients, by bits
FORMATS = {
    8: (Format(8, 256, "signed"), Format(8, 256, "unsigned")),
    4: (Format(4, 128, "signed"), Format(4, 128, "linear")),
}
KEYS = ("exp_avg", "exp_avg_sq")
FULL = 32
# Numbers that are expanded to fp32 at a time, multiples of all block sizes: on a CPU, so few that they stay in its second cache
CHUNK, CHUNK_ON_CPU = 2**23, 2**17

Moments = tuple[Tensor, ...]


def is_quantized(count: int, bits: int) -> bool:
    """Return whether moments of `count` numbers are stored in fewer than 32 bits."""
    return bits < FULL and count >= SMALLEST


def moment_bytes(count: int, bits: int) -> int:
    """Return the bytes of both moments of `count` numbers."""
    if not is_quantized(count, bits):
        return 2 * count * torch.float32.itemsize
    return sum(stored.bytes(count) for stored in FORMATS[bits])


def moments_in(state: dict[str, Any], like: Tensor, bits: int) -> Moments:
    """Return the tensors that hold the moments in `state`; at first, zeros for a tensor of the shape of `like`.

    In fp32, these are two tensors of that shape; quantized, indices and scales of the first and of the second moment.
    """
    quantized = is_quantized(like.numel(), bits)
    if KEYS[0] not in state:
        for key, stored in zip(KEYS, FORMATS[bits] if quantized else (None, None)):
            if stored is None:
                state[key] = torch.zeros(like.shape, device=like.device)
            else:
                state[key], state[f"{key}_scale"] = stored.zeros(like.numel(), like.device)
    names = [name for key in KEYS for name in ((key, f"{key}_scale") if quantized else (key,))]
    return tuple(state[name] for name in names)


def update(
    moments: Moments, gradient: Tensor, betas: tuple[float, float], bits: int
) -> tuple[Tensor, Tensor]:
    """Update the moments in place with a gradient in fp32, and return both in fp32, with the gradient's shape.

    What is returned are the moments before they are quantized again, as in bitsandbytes.
    """
    pairs = list(zip(moments[::2], moments[1::2]))
    if len(moments) == len(KEYS):
        first, second = moments
    else:
        formats = zip(FORMATS[bits], pairs)
        first, second = (
            stored.read(indices, scales, gradient.numel()).view_as(gradient)
            for stored, (indices, scales) in formats
        )
    first.lerp_(gradient, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    if len(moments) != len(KEYS):
        for stored, values, (indices, scales) in zip(FORMATS[bits], (first, second), pairs):
            stored.write(values.reshape(-1), indices, scales)
    return first, second


def chunks(count: int, bits: int, device: torch.device) -> list[tuple[slice, tuple[slice, ...]]]:
    """Return pairs of a slice of `count` numbers, and the slices of quantized moments that belong to it."""
    found = []
    size = CHUNK_ON_CPU if device.type == "cpu" else CHUNK
    for start in range(0, count, size):
        end = min(start + size, count)
        parts: list[slice] = []
        for stored in FORMATS[bits]:
            parts += [_part(start, end, stored.bits / 8), _part(start, end, 1 / stored.block)]
        found.append((slice(start, end), tuple(parts)))
    return found


def _part(start: int, end: int, share: float) -> slice:
    return slice(math.floor(start * share), math.ceil(end * share))


def bias_corrections(betas: tuple[float, float], step: int) -> tuple[float, float]:
    """Return 1 - beta1^step and the root of 1 - beta2^step: the sizes that moments from zero lack after `step` steps."""
    return 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)
