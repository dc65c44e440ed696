"""Attention of a training step on a CPU, in few passes over the weights.

torch computes dropout of the attention weights with its serial generator, and the gradient of fused attention on a CPU is
slow in bf16 for short sequences: 45 ms for 32 rows of 25 tokens and 12 heads of 32, 8 ms here; equal at about 200 tokens.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

SHORT = 160  # tokens up to which the gradient here is faster than that of fused attention in bf16

TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Masks:
    """Masks as numbers to add to scores, in fp32. The last one is kept, since all layers of a model use the same."""

    def __init__(self) -> None:
        self.last: tuple[Tensor | None, tuple[int, ...], Tensor] | None = None

    def __call__(self, mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
        """Return the mask for the scores of queries and keys, (..., length, kv length); None if there is none."""
        if mask is None and not is_causal:
            return None
        shape = (query.shape[-2], key.shape[-2]) if is_causal else ()
        if self.last is not None and self.last[0] is mask and self.last[1] == shape:
            return self.last[2]
        given = mask
        if is_causal:
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        assert mask is not None
        if mask.dtype == torch.bool:
            least = torch.finfo(torch.float32).min
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, least)
        self.last = given, shape, mask.float()
        return self.last[2]


class Draws(Protocol):
    """What attention needs of a source of dropout masks."""

    masks: Masks

    def factors(self, shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
        """Return numbers of the given shape and type: 1 / (1 - p) with probability 1 - p, else 0."""


def attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool, source: Draws,
) -> Tensor | None:  # fmt: skip
    """Return dropout(softmax(q k^T scale + mask)) v, as `scaled_dot_product_attention` defines it, (..., length, width).

    None where torch should compute it: without dropout if that is as fast, and what `Attention` has no gradient for.
    """
    if torch.compiler.is_compiling() or query.is_nested:
        return None
    short = computed_in(query) == torch.bfloat16 and max(query.shape[-2], key.shape[-2]) <= SHORT
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not (p or (short and learns)):
        return None
    query, key, value = (x.to(computed_in(x)) for x in (query, key, value))
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if not can_attend(query, key, value, mask):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Attention.apply(query, key, value, mask, is_causal, scale, p, source)  # type: ignore[no-untyped-call]


def can_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Return whether `Attention` computes the gradients of these: of one type and batch, and none for the mask."""
    kinds, batches = (
        {query.dtype, key.dtype, value.dtype},
        {query.shape[:-2], key.shape[:-2], value.shape[:-2]},
    )
    learned = mask is not None and mask.requires_grad
    return len(kinds) == len(batches) == 1 and query.dtype in TYPES and not learned


def computed_in(x: Tensor) -> torch.dtype:
    """Return the type that autocast gives to matrix products, if it is on; otherwise the tensor's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Attention(torch.autograd.Function):
    """`attended`. The softmax is in fp32: more accurate than in bf16, and twice as fast on CPUs."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
        p: float, source: Draws,
    ) -> Tensor:  # fmt: skip
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()  # else in each product
        shape = torch.Size((*query.shape[:-1], key.shape[-2]))
        added = source.masks(mask, is_causal, query, key)
        kept = source.factors(shape, p, query.dtype) if p else None
        output, weights, dropped = weighted(query, key, value, added, kept, scale)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, weights, kept, dropped)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        return *weighted_gradients(gradient, ctx.scale, *ctx.saved_tensors), None, None, None, None, None


def weighted(
    query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, kept: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of attention, (..., length, width), its weights in fp32, and those after dropout.

    `added`: numbers to add to the scores, in fp32; `kept`: factors of dropout.
    """
    scores = query @ key.transpose(-2, -1)
    if added is None:
        scores = scores.float().mul_(scale)
    else:
        scores = torch.add(added, scores, alpha=scale)
    weights = scores.softmax(dim=-1)
    used = weights.to(value.dtype)
    dropped = used if kept is None else used * kept
    return dropped @ value, weights, dropped


def weighted_gradients(
    gradient: Tensor, scale: float, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, kept: Tensor | None,
    dropped: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value from that of the output of `weighted`."""
    of_value = dropped.transpose(-2, -1) @ gradient
    of_used = gradient @ value.transpose(-2, -1)
    if kept is not None:
        of_used.mul_(kept)
    of_scores = torch._softmax_backward_data(of_used.float(), weights, -1, torch.float32)
    of_scores = of_scores.mul_(scale).to(query.dtype)
    return of_scores @ key, of_scores.transpose(-2, -1) @ query, of_value
