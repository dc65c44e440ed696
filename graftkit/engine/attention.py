"""Attention of a training step on a CPU, in few passes over the weights.

torch computes dropout of the attention weights with its serial generator, and the gradient of fused attention on a CPU is
slow in bf16 for short sequences: 45 ms for 32 rows of 25 tokens and 12 heads of 32, 8 ms here; equal at about 200 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHORT = 160  # tokens up to which the gradient here is faster than that of fused attention in bf16

TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Masks:
    """Masks as numbers to add to scores, in fp32. The last one is kept, since all layers of a model use the same."""

    def __init__(self) -> None:
        self.last: tuple[Tensor | None, tuple[int, ...], Tensor] | None = None

    def __call__(self, mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
        """Return the mask for scores (..., length, kv length); None if there is none."""
        if mask is None and not is_causal:
            return None
        shape = tuple(scores.shape[-2:]) if is_causal else ()
        if self.last is not None and self.last[0] is mask and self.last[1] == shape:
            return self.last[2]
        given = mask
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        assert mask is not None
        if mask.dtype == torch.bool:
            least = torch.finfo(torch.float32).min
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, least)
        self.last = given, shape, mask.float()
        return self.last[2]


def attend(
    query: Tensor, key: Tensor, value: Tensor, masks: Masks, mask: Tensor | None, is_causal: bool,
    scale: float | None, keep: Callable[[Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    """Return dropout(softmax(q k^T scale + mask)) v, (..., length, width), in the type of `value`.

    `keep`: returns for attention weights what they are multiplied by: 0 or 1 / (1 - p); None without dropout.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Attention.apply(query, key, value, masks, mask, is_causal, scale, keep)  # type: ignore[no-untyped-call]


def can_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Return whether `attend` computes the gradients of these: of one type and batch, and none for the mask."""
    kinds, batches = {query.dtype, key.dtype, value.dtype}, {query.shape[:-2], key.shape[:-2], value.shape[:-2]}
    learned = mask is not None and mask.requires_grad
    return len(kinds) == len(batches) == 1 and query.dtype in TYPES and not learned


def autocast_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the type that autocast gives to matrix products, if it is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


class Attention(torch.autograd.Function):
    """`attend`. The softmax is in fp32: more accurate than in bf16, and twice as fast on CPUs."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, masks: Masks, mask: Tensor | None, is_causal: bool,
        scale: float, keep: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:  # fmt: skip
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()  # else in each product
        scores = query @ key.transpose(-2, -1)
        added = masks(mask, is_causal, scores)
        if added is None:
            scores = scores.float().mul_(scale)
        else:
            scores = torch.add(added, scores, alpha=scale)
        weights = scores.softmax(dim=-1)
        used = weights.to(value.dtype)
        kept = None if keep is None else keep(used)
        dropped = used if kept is None else used * kept
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, weights, kept, dropped)
        return dropped @ value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        query, key, value, weights, kept, dropped = ctx.saved_tensors
        of_value = dropped.transpose(-2, -1) @ gradient
        of_used = gradient @ value.transpose(-2, -1)
        if kept is not None:
            of_used.mul_(kept)
        of_scores = torch._softmax_backward_data(of_used.float(), weights, -1, torch.float32)
        of_scores = of_scores.mul_(ctx.scale).to(query.dtype)
        of_query, of_key = of_scores @ key, of_scores.transpose(-2, -1) @ query
        return of_query, of_key, of_value, None, None, None, None, None
