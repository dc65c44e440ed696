"""Attention within the parts of packed rows, without a mask of (length, length).

`packed` says, while a model is called, which parts its rows have. The attention function of `graftkit.backbone.attention`
then attends within each part: by `varlen_attn` on a GPU that has it, or else part by part. Layers whose mask says more than
causal (a sliding window, attention in both directions between some tokens) get transformers' mask, which keeps parts apart
too, because positions restart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Parts:
    """The sizes of the parts of each row of a batch, padding included; they sum to the same length in each row."""

    def __init__(self, sizes: Sequence[Sequence[int]]) -> None:
        self.sizes = [list(row) for row in sizes]
        self._bounds: Tensor | None = None

    @property
    def longest(self) -> int:
        return max(map(max, self.sizes))

    def bounds(self, device: torch.device) -> Tensor:
        """Return where the parts of all rows begin and end when the rows stand one behind the other, (parts + 1,) int32."""
        if self._bounds is None:
            ends = np.cumsum([0, *(size for row in self.sizes for size in row)])
            self._bounds = torch.from_numpy(ends.astype(np.int32)).to(device, non_blocking=True)
        return self._bounds


_now: list[Parts | None] = [None]


def current() -> Parts | None:
    """Return the parts of the rows that are being computed; None if they are not packed."""
    return _now[-1]


@contextmanager
def packed(parts: Parts | None) -> Iterator[None]:
    """Attend within these parts in a `with` block."""
    _now.append(parts)
    try:
        yield
    finally:
        _now.pop()


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return transformers' mask; None in place of one that would only be causal and keep parts apart.

    `local_size`, `use_vmap` and `attention_mask` say that a mask does more (transformers 5.17 to 5.24).
    """
    from transformers.masking_utils import sdpa_mask

    more = kwargs.get("use_vmap") or kwargs.get("local_size") or kwargs.get("attention_mask") is not None
    if current() is not None and not more and not kwargs.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(*args, **kwargs)


def at_once(
    query: Tensor, key: Tensor, value: Tensor, parts: Parts, given: Mapping[str, Any]
) -> Tensor | None:
    """Return causal attention within all parts, (batch, length, heads, d), by torch's `varlen_attn`; None where it does not
    apply. `given`: the other arguments of transformers' attention functions."""
    variable = _variable(query.device.type)
    half = query.dtype in (torch.bfloat16, torch.float16)
    if variable is None or not half or given.get("dropout") or given.get("is_causal") is False:
        return None
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    bounds, most = parts.bounds(query.device), parts.longest
    found = variable(*flat, bounds, bounds, most, most, scale=given.get("scaling"), window_size=(-1, 0))
    return found.unflatten(0, (len(query), -1))


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, parts: Parts, attend: Callable[..., Tensor]
) -> Tensor:
    """Return the attention of each part, (batch, length, heads, d). `attend` takes the queries, keys and values of one,
    (1, heads, length, d), and returns (1, length, heads, d)."""
    rows = []
    for sizes, *states in zip(parts.sizes, *(t.split(1) for t in (query, key, value))):
        pieces = zip(*(state.split(sizes, dim=2) for state in states))
        rows.append(torch.cat([attend(*piece) for piece in pieces], dim=1))
    return torch.cat(rows)


@functools.cache
def _variable(device: str) -> Callable | None:
    """Return torch's attention over rows of different lengths, if it runs on such a device."""
    if device != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability()[0] < 8:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn
