"""Dropout that does not cost a quarter of the step.

PyTorch draws dropout masks on the CPU one number at a time from one Mersenne Twister. Within `fast_dropout`,
`torch.nn.functional.dropout` and the attention dropout of `scaled_dot_product_attention` take 16-bit numbers
from NumPy's SFC64 instead (p is met to within 1/65,536). The generator is seeded by (seed, step), so a step's
randomness does not depend on what ran before it. On other devices PyTorch's own dropout is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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

    def again(self) -> AbstractContextManager[None]:
        """Return a context in which the masks are those that are drawn from now on."""
        state = self.bits.state

        @contextmanager
        def back() -> Iterator[None]:
            later, self.bits.state = self.bits.state, state
            try:
                yield
            finally:
                self.bits.state = later

        return back()


_current: list[Source] = []  # of the `fast_dropout` that runs


def current() -> Source | None:
    """Return the source of masks of the step that runs; None if PyTorch's own dropout is used."""
    return _current[-1] if _current else None


@contextmanager
def fast_dropout(device: torch.device, *seed: int) -> Iterator[None]:
    """Replace the two dropout functions while the block runs; a no-op on devices other than the CPU."""
    if device.type != "cpu":
        yield
        return
    source = Source(*seed)
    plain_dropout, plain_attention = F.dropout, F.scaled_dot_product_attention

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0 or inplace or p >= 1.0:
            return plain_dropout(input, p, training, inplace)
        return source.drop(input, p)

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                  dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                  enable_gqa: bool = False, **more: Any) -> Tensor:  # fmt: skip
        if dropout_p == 0.0 or more:
            return plain_attention(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
                scale=scale, enable_gqa=enable_gqa, **more,
            )  # fmt: skip
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        weights = attention_weights(query, key, attn_mask, is_causal, scale)
        return source.drop(weights.to(value.dtype), dropout_p) @ value

    F.dropout, F.scaled_dot_product_attention = dropout, attention  # type: ignore[assignment]
    _current.append(source)
    try:
        yield
    finally:
        _current.pop()
        F.dropout, F.scaled_dot_product_attention = plain_dropout, plain_attention


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
