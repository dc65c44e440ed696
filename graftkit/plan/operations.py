"""The arithmetic of single operations of torch: their kind, floating-point operations and bytes, from shapes alone.

`torch.utils.flop_counter` counts nothing for attention on a CPU, for products that are added in place and for oneDNN's linear
layer, and too much for the gradients of convolutions in groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PRODUCTS, ATTENTION, CONVOLUTION, ELEMENTWISE, VIEW = (
    "products",
    "attention",
    "convolution",
    "elementwise",
    "view",
)
KINDS = (PRODUCTS, ATTENTION, CONVOLUTION, ELEMENTWISE)


@dataclass(frozen=True)
class Operation:
    """One call. `shape`: of a product (matrices, rows, columns, inner); of anything else its number of elements.

    `flops`: multiplications and additions; 0 for element-wise work, of which `bytes`, read and written, count.
    """

    kind: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    flops: float
    bytes: float


def operation_of(function: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Operation:
    """Return what a call of torch did: `function` is the operator, as a dispatch mode gets it."""
    name = function.name().removeprefix("aten::").partition(".")[0]
    outputs, inputs = list(tensors(output)), list(tensors((args, kwargs)))
    dtype = outputs[0].dtype if outputs else torch.float32
    moved = float(sum(held(t) for t in inputs) + sum(held(t) for t in outputs))
    if getattr(function, "is_view", False) or not outputs or name in ALIASES:
        return Operation(VIEW, name, dtype, (), 0.0, 0.0)
    if name in SHAPES:
        batch, rows, columns, inner = SHAPES[name](args, outputs)
        flops = 2.0 * batch * rows * columns * inner
        return Operation(PRODUCTS, name, dtype, (batch, rows, columns, inner), flops, moved)
    if "convolution" in name:
        shape = _unfolded(name, args, outputs)
        gradients = (
            sum(args[-1][:2]) if "backward" in name else 1
        )  # of the input and of the weight, as far as wanted
        return Operation(CONVOLUTION, name, dtype, shape, 2.0 * gradients * math.prod(shape), moved)
    if name.startswith("_scaled_dot_product"):
        return _attention(name, args, kwargs, dtype, moved)
    return Operation(ELEMENTWISE, name, dtype, (max((t.numel() for t in outputs), default=0),), 0.0, moved)


def _product(left: int, right: int) -> Callable[[tuple, list[Tensor]], tuple[int, int, int, int]]:
    def shape(args: tuple, outputs: list[Tensor]) -> tuple[int, int, int, int]:
        a, b = args[left].shape, args[right].shape
        batch = a[0] if len(a) == 3 else 1
        return batch, math.prod(a[:-1]) // batch, b[-1] if len(b) > 1 else 1, a[-1]

    return shape


def _linear(args: tuple, outputs: list[Tensor]) -> tuple[int, int, int, int]:
    x, weight = args[0], args[1]
    return 1, x.numel() // x.shape[-1], weight.shape[0], weight.shape[1]


SHAPES: dict[str, Callable[[tuple, list[Tensor]], tuple[int, int, int, int]]] = {
    "mm": _product(0, 1), "bmm": _product(0, 1), "mv": _product(0, 1), "dot": _product(0, 1),
    "addmm": _product(1, 2), "addmm_": _product(1, 2), "baddbmm": _product(1, 2), "baddbmm_": _product(1, 2),
    "addmv": _product(1, 2), "addbmm": _product(1, 2),
    "linear": _linear, "mkldnn::_linear_pointwise": _linear, "mkldnn_linear": _linear,
}  # fmt: skip
ALIASES = {"detach", "alias", "lift_fresh", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "empty_permuted",
           "new_empty_strided"}  # fmt: skip


def _attention(name: str, args: tuple, kwargs: dict[str, Any], dtype: torch.dtype, moved: float) -> Operation:
    """Two products forward, five backward, of which one computes the weights again; half of that if it is causal."""
    backward = "backward" in name
    query, key, value = args[1:4] if backward else args[:3]
    batch, heads, length, width = query.shape
    one = 2.0 * batch * heads * length * key.shape[-2]
    flops = one * (3 * width + 2 * value.shape[-1] if backward else width + value.shape[-1])
    causal = any(value is True for value in (*args[4:], kwargs.get("is_causal", False)))
    shape = batch * heads, length, key.shape[-2], width
    return Operation(ATTENTION, name, dtype, shape, flops * (0.5 if causal else 1.0), moved)


def _unfolded(name: str, args: tuple, outputs: list[Tensor]) -> tuple[int, int, int, int]:
    """Return the product that a convolution is: (groups, places, channels out, weights of each of these)."""
    weight = args[2] if "backward" in name else args[1]
    given = args[0] if "backward" in name else outputs[0]
    places = given.numel() // max(1, given.shape[1])
    groups = next((a for a in reversed(args) if type(a) is int), 1)
    return groups, places, weight.shape[0] // groups, weight[0].numel()


def tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors(value)


def held(tensor: Tensor) -> int:
    """Return the bytes of the elements of a tensor; those that are expanded count once."""
    elements = math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride or size < 2)
    return elements * tensor.element_size()
