"""Dropout that does not cost a quarter of the step.

PyTorch draws dropout masks on the CPU one number at a time from one Mersenne Twister. Within `fast_dropout`,
`torch.nn.functional.dropout` and the attention dropout of `scaled_dot_product_attention` take 16-bit numbers
from NumPy's SFC64 instead (p is met to within 1/65,536). The generator is seeded by (seed, step), so a step's
randomness does not depend on what ran before it. On other devices PyTorch's own dropout is used.

Attention is computed by `graftkit.engine.attention`, without dropout too where its gradient is faster than torch's.
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

from graftkit.engine.attention import Masks, attended

LEVELS = 1 << 16
BITS = {torch.float32: np.int32, torch.bfloat16: np.int16, torch.float16: np.int16}


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed PyTorch's generators of the CPU and of this device.

    `torch.manual_seed` seeds those of all kinds of devices. For each kind that is not in use it formats a stack trace, which
    takes longer than the arithmetic of a small step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


class Source:
    """Random 16-bit integers for one step."""

    def __init__(self, *seed: int) -> None:
        self.bits = np.random.SFC64(list(seed))
        self.masks = Masks()

    def keep(self, shape: torch.Size, p: float) -> Tensor:
        """Return booleans of the given shape, each true with probability 1 - p."""
        return torch.from_numpy(self._kept(math.prod(shape), p)).view(shape)

    def factors(self, shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
        """Return numbers of the given shape and type: 1 / (1 - p) with probability 1 - p, else 0."""
        factor = torch.tensor(1.0, dtype=dtype).mul_(1 / (1 - p))
        if dtype not in BITS:
            return self.keep(shape, p).to(dtype).mul_(factor)
        # the bits of the number where it is kept: one pass of NumPy's
        integer: Any = BITS[dtype]
        bits = factor.view({np.int32: torch.int32, np.int16: torch.int16}[integer]).item()
        kept = np.multiply(self._kept(math.prod(shape), p).view(np.int8), integer(bits))
        return torch.from_numpy(kept).view(dtype).view(shape)

    def _kept(self, count: int, p: float) -> np.ndarray:
        raw = self.bits.random_raw((count + 3) // 4).view(np.int16)[:count]
        return raw >= round(p * LEVELS) - LEVELS // 2

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Zero each element of x with probability p, and divide the others by 1 - p."""
        return x * self.factors(x.shape, p, x.dtype)

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


@torch.library.custom_op("graftkit::keep", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def drawn(x: Tensor, p: float) -> Tensor:
    """Return booleans of the shape of x from the source of the step, for compiled code, which calls but does not trace this."""
    return _source().keep(x.shape, p)


@drawn.register_fake
def _shape_of_drawn(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)


PLAIN_DROPOUT, PLAIN_ATTENTION = F.dropout, F.scaled_dot_product_attention


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
    if not more and not torch.compiler.is_compiling():
        quick = attended(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _source())
        if quick is not None:
            return quick
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
    with drawing_from(Source(*seed)):
        yield


@contextmanager
def drawing_from(source: Source) -> Iterator[None]:
    """Replace the two dropout functions, on the CPU, by those that draw from this source."""
    before = F.dropout, F.scaled_dot_product_attention
    _current.append(source)
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
