"""Dropout that does not cost a quarter of the step.

PyTorch draws dropout masks on the CPU one number at a time from one Mersenne Twister. Within `fast_dropout`,
`torch.nn.functional.dropout` and the attention dropout of `scaled_dot_product_attention` take 16-bit numbers
from NumPy's SFC64 instead (p is met to within 1/65,536). The generator is seeded by (seed, step), so a step's
randomness does not depend on what ran before it. On other devices PyTorch's own dropout is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 1 << 16


class Source:
    """Random 16-bit integers for one step."""

    def __init__(self, *seed: int) -> None:
        self.bits = np.random.SFC64(list(seed))

    def keep(self, shape: torch.Size, p: float) -> Tensor:
        """Return booleans of the given shape, each true with probability 1 - p."""
        count = math.prod(shape)
        raw = self.bits.random_raw((count + 3) // 4).view(np.int16)[:count]
        threshold = round(p * LEVELS) - LEVELS // 2
        return torch.from_numpy(raw).view(shape) >= threshold

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Zero each element of x with probability p, and divide the others by 1 - p."""
        mask = self.keep(x.shape, p).to(x.dtype)
        return x * mask.mul_(1 / (1 - p))


@torch.library.custom_op("graftkit::keep", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def drawn(x: Tensor, p: float) -> Tensor:
    """Return booleans of the shape of x from the source of the step, for compiled code, which calls but does not trace this."""
    return _source().keep(x.shape, p)


@drawn.register_fake
def _shape_of_drawn(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)


PLAIN_DROPOUT, PLAIN_ATTENTION = F.dropout, F.scaled_dot_product_attention
_current: list[Source] = []  # of the `fast_dropout` that runs


def _source() -> Source:
    if not _current:
        raise RuntimeError("code that was compiled within fast_dropout is called outside of it.")
    return _current[-1]


def _dropped(x: Tensor, p: float) -> Tensor:
    """Return x with dropout; traced by torch.compile, the mask is drawn by one opaque operation."""
    if not torch.compiler.is_compiling():
        return _source().drop(x, p)
    return x * (drawn(x.detach(), p).to(x.dtype) * (1 / (1 - p)))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0 or inplace or p >= 1.0:
        return PLAIN_DROPOUT(input, p, training, inplace)
    return _dropped(input, p)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False, **more: Any) -> Tensor:  # fmt: skip
    if dropout_p == 0.0 or more:
        return PLAIN_ATTENTION(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
            scale=scale, enable_gqa=enable_gqa, **more,
        )  # fmt: skip
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    weights = attention_weights(query, key, attn_mask, is_causal, scale)
    return _dropped(weights.to(value.dtype), dropout_p) @ value


@contextmanager
def fast_dropout(device: torch.device, *seed: int) -> Iterator[None]:
    """Replace the two dropout functions while the block runs; a no-op on devices other than the CPU."""
    if device.type != "cpu":
        yield
        return
    before = F.dropout, F.scaled_dot_product_attention
    _current.append(Source(*seed))
    F.dropout, F.scaled_dot_product_attention = _dropout, _attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = before
        _current.pop()


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Return softmax(q k^T scale + mask), (..., length, kv length), as `scaled_dot_product_attention` defines it."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.float().softmax(dim=-1)  # in fp32: more accurate than in bf16, and twice as fast on CPUs
