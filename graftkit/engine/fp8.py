"""Products with frozen weights in fp8, forward and for the gradient of the input.

Each row of a weight has a scale, found once, and each row of an input its own, found in every product (Micikevicius et al.
2022, 'FP8 Formats for Deep Learning'; scales by row as in torch._scaled_mm). With a scale for each row the range of E4M3 is
enough for gradients too, so that all three are in it, as in torchao's recipe with scales by row. Sums are in fp32 and results in the input's type. Trained weights, what methods add, norms,
attention and layers outside the blocks are computed as without it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftkit.backbone import Backbone
from graftkit.errors import UserError

E4M3 = torch.float8_e4m3fn
LEAST = (9, 0)  # compute capability: Hopper, the first with scales by row
MULTIPLE = 16  # of both sizes of a matrix, which the products need
TINY = 1e-12


def refuse_fp8(device: torch.device) -> None:
    """Raise `UserError` if a device has no products in fp8."""
    if device.type != "cuda" or torch.version.hip is not None:
        raise UserError(
            f"train.precision=fp8 needs an NVIDIA GPU, but this run is on {device.type}; use train.precision=auto."
        )
    if torch.cuda.get_device_capability(device) < LEAST:
        raise UserError(
            f"train.precision=fp8 needs an NVIDIA GPU of the Hopper generation or later, but this is a "
            f"{torch.cuda.get_device_name(device)}; use train.precision=auto."
        )


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (rows, n) in E4M3, and the scale (rows, 1) in fp32 that gives it back: x = values * scale."""
    largest = x.abs().amax(dim=1, keepdim=True).float()
    scale = (largest / torch.finfo(E4M3).max).clamp(min=TINY)
    return (x.float() / scale).to(E4M3), scale


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, kind: torch.dtype) -> Tensor:
    """Return A B^T (rows, out) in `kind`, for a (rows, n) and b (out, n) in fp8 with scales (rows, 1) and (out, 1).

    On a CPU the product is emulated in fp32, which has the same sums but for their rounding.
    """
    if a.is_cuda:
        return torch._scaled_mm(
            a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=kind, use_fast_accum=True
        )
    return ((a.float() @ b.float().t()) * a_scale * b_scale.t()).to(kind)


class _Linear(torch.autograd.Function):
    """y = x W^T for x (rows, in), with a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return product(*quantized(x), layer.weight, layer.scale, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        return product(*quantized(gradient), layer.transposed, layer.transposed_scale, gradient.dtype), None


class FrozenLinear:
    """The forward of a linear layer whose frozen weight is in fp8: (out, in) by rows, and transposed by its own rows."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        weight = module.weight.detach()
        self.weight, self.scale = quantized(weight)
        self.transposed, self.transposed_scale = quantized(weight.t().contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        kind = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        )
        rows = x.to(kind).reshape(-1, x.shape[-1])
        y = _Linear.apply(rows, self).view(*x.shape[:-1], -1)
        return y if self.module.bias is None else y + self.module.bias.to(kind)


def quantize_frozen(backbone: Backbone, trained: Container[str]) -> int:
    """Let the frozen linear layers of the blocks multiply in fp8 from now on. Return how many they are.

    Their weights stay as they are beside the copies in fp8, so that grafts fold, and base values can be compared. Layers
    whose sizes are no multiples of 16 stay as they are.
    """
    layers = list(frozen_layers(backbone, trained))
    for module in layers:
        module.forward = FrozenLinear(module)  # type: ignore[method-assign,assignment]
    return len(layers)


def frozen_layers(backbone: Backbone, trained: Container[str]) -> Iterator[nn.Linear]:
    """Yield the layers that `quantize_frozen` concerns."""
    for site in backbone.sites:
        module = site.module
        if type(module) is not nn.Linear or not site.called or site.block is None:
            continue
        sizes = module.in_features, module.out_features
        if f"{site.name}.weight" not in trained and not any(size % MULTIPLE for size in sizes):
            yield module


def copies_bytes(backbone: Backbone, trained: Container[str]) -> int:
    """Return the bytes of the copies in fp8, both ways, with their scales in fp32."""
    return sum(
        2 * m.in_features * m.out_features + 4 * (m.in_features + m.out_features)
        for m in frozen_layers(backbone, trained)
    )
