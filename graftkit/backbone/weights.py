"""The weight matrices W (out, in) of a model, whatever kind of module holds them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone.anatomy import Site, features, holds_experts, is_conv, is_linear, is_transposed
from graftkit.backbone.backbone import Backbone

CONVOLUTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


@dataclass(frozen=True)
class Weight:
    """One weight: the parameter with this dotted name below `module`, which is the module that is called.

    `kind`: 'linear' (out, in), 'transposed' (Conv1D of GPT-2, stored (in, out)), 'conv' (out, in / groups, *kernel),
    'embedding' (a linear layer on one-hot rows, stored (in, out)), 'packed' (in an `nn.MultiheadAttention` or similar,
    which multiplies by it without calling a module) or 'experts' (experts, out, in), in some models stored
    (experts, in, out). The last two can only be replaced.
    """

    module: nn.Module
    parameter: str
    kind: str

    @property
    def value(self) -> Tensor:
        name = self.parameter.rpartition(".")[2]
        parameter = self.owner._parameters[name]  # even while something replaces it as an attribute
        assert parameter is not None
        return parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W: (out, in), (out, in / groups, *kernel) or (experts, out, in)."""
        if self.kind in ("linear", "transposed"):
            return features(self.module)[::-1]
        stored = tuple(self.value.shape)
        return (*stored[:-2], stored[-1], stored[-2]) if self.is_transposed else stored

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter is stored (in, out)."""
        if self.kind == "experts":  # an attribute of transformers' expert classes
            return bool(getattr(self.module, "is_transposed", False))
        return self.kind in ("transposed", "embedding")

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter: `module`, or one below it."""
        return self.module.get_submodule(self.parameter.rpartition(".")[0])

    @property
    def replaced(self) -> bool:
        """Whether an update has to replace the parameter, as no module multiplies by it alone."""
        return self.kind in ("packed", "experts")

    @property
    def is_quantized(self) -> bool:
        return not self.value.dtype.is_floating_point

    def stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix in the layout of W in the layout of the stored parameter, and vice versa."""
        return matrix.transpose(-2, -1) if self.is_transposed else matrix


def weights_at(backbone: Backbone, site: Site) -> list[Weight]:
    """Return the weights that a site holds; an empty list if it multiplies by none."""
    module = site.module
    if isinstance(module, nn.MultiheadAttention):
        names = [name for name, p in module.named_parameters(recurse=False) if p.dim() == 2]
        return [Weight(module, name, "packed") for name in names]
    if not site.called:
        parent, _, leaf = site.name.rpartition(".")
        return [Weight(backbone.module(parent), f"{leaf}.weight", "packed")]
    if is_linear(module):
        return [Weight(module, "weight", "transposed" if is_transposed(module) else "linear")]
    if is_conv(module):
        return [Weight(module, "weight", "conv")]
    if isinstance(module, nn.Embedding):
        return [Weight(module, "weight", "embedding")]
    if holds_experts(module):
        return [
            Weight(module, name, "experts")
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3
        ]
    return []


def groups_of(weight: Weight) -> int:
    """Groups of a convolution; 1 of any other map."""
    return int(getattr(weight.module, "groups", 1)) if weight.kind == "conv" else 1


def has_geometry(weight: Weight) -> bool:
    """Whether a convolution is dilated, or pads with something other than zeros."""
    module: Any = weight.module
    return weight.kind == "conv" and (set(module.dilation) != {1} or module.padding_mode != "zeros")


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """`with without_autocast(x):` computes in the types of the tensors themselves."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _autocasts(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _transformed() -> bool:
    """Whether a transform of torch.func runs. The functions below have no rule for it: to have one, they would have to
    define `setup_context`, and then torch inspects the signature of `forward` in every call, 50 microseconds each."""
    return torch._C._are_functorch_transforms_active()


def input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a map was called with, whether by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the type that autocast chooses; without autocast, in the type of W."""
    if x.dtype != weight.dtype and not _autocasts(x):
        x = x.to(weight.dtype)
    return nn.functional.linear(x, weight, bias)


def add_product(
    y: Tensor, x: Tensor, weight: Tensor, scale: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """y + scale x W^T + bias in the type of y (..., out); one pass over y where the types allow it."""
    if y.dtype != x.dtype or (y.dtype != weight.dtype and not _autocasts(x)) or y.is_nested or _transformed():
        added = multiply(x, weight) * scale
        return y + (added if bias is None else added + bias).to(y.dtype)
    rows, low = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    return AddProduct.apply(rows, low, weight, scale, bias).view(y.shape)  # type: ignore[no-untyped-call]


class AddProduct(torch.autograd.Function):
    """y + scale x W^T + bias for x (rows, r) and W (out, r) with a small r.

    Its gradients are those of `torch.addmm`, from products that are up to several times as fast on CPUs.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        ctx.scale, ctx.bias = scale, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        if bias is None:
            return torch.addmm(y, x, weight.T, alpha=scale)
        return (y + bias.to(y.dtype)).addmm_(x, weight.to(y.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            of_x = narrow_product(gradient, weight.to(gradient.dtype) * ctx.scale)
        if ctx.needs_input_grad[2]:
            of_weight = ((x.to(gradient.dtype).T @ gradient).T * ctx.scale).to(weight.dtype)
        if ctx.needs_input_grad[4]:
            of_bias = gradient.sum(0).to(ctx.bias)
        return gradient, of_x, of_weight, None, of_bias


def scale_product(
    y: Tensor, x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Return gain (y - bias + scale x W^T) + bias for y (..., out), gain and bias (out), in the dtype of y."""
    same = {y.dtype, x.dtype, weight.dtype, gain.dtype} == {y.dtype}
    plain = y.is_nested or _autocasts(x) or _transformed() or not torch.is_grad_enabled()
    if same and not plain:
        rows, low = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        return ScaleProduct.apply(rows, low, weight, gain, bias, scale).view(y.shape)  # type: ignore[no-untyped-call]
    whole = add_product(y, x, weight, scale)
    if bias is None:
        return (gain * whole).to(y.dtype)
    return torch.addcmul(bias - gain * bias, gain, whole).to(y.dtype)


class ScaleProduct(torch.autograd.Function):
    """gain (y - bias + scale x W^T) + bias for y (rows, out), x (rows, r) and W (out, r) with a small r.

    It makes few passes over tensors as large as y: two forward, scaling W instead of the sum and saving only y; two
    backward, as the gradient of the gain comes from that of W and from g y, in pieces that stay in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(y, x, weight, gain, bias)
        scaled = y * gain if bias is None else torch.addcmul(bias - gain * bias, gain, y)
        return scaled.addmm_(x, (weight * gain[:, None]).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        y, x, weight, gain, bias = ctx.saved_tensors
        scaled = weight * gain[:, None] * ctx.scale
        of_y = gradient * gain if ctx.needs_input_grad[0] else None
        of_x = narrow_product(gradient, scaled) if ctx.needs_input_grad[1] else None
        plain = ctx.scale * (x.T @ gradient).T  # gradient of W, without the gain
        of_gain = (plain * weight).sum(1) + _column_products(y, gradient)
        of_bias = None
        if bias is not None:
            together = gradient.sum(0)
            of_gain = of_gain - bias * together
            of_bias = (1 - gain) * together if ctx.needs_input_grad[4] else None
        return of_y, of_x, plain * gain[:, None], of_gain, of_bias, None


def scale_columns(x: Tensor, gain: Tensor) -> Tensor:
    """Return gain x for x (..., width) and gain (width), in the dtype of x."""
    if x.dtype != gain.dtype or x.is_nested or _transformed() or not torch.is_grad_enabled():
        return (x * gain).to(x.dtype)
    return ScaleColumns.apply(x.reshape(-1, x.shape[-1]), gain).view(x.shape)  # type: ignore[no-untyped-call]


class ScaleColumns(torch.autograd.Function):
    """gain x for x (rows, width); the gradient of the gain takes no memory of the size of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return x * gain

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        x, gain = ctx.saved_tensors
        of_gain = _column_products(x, gradient) if ctx.needs_input_grad[1] else None
        return gradient * gain if ctx.needs_input_grad[0] else None, of_gain


def narrow_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b for b (k, r); if r is smaller than a CPU register, putting b on the left takes a third of the time."""
    return (b.T @ a.T).T if b.shape[1] < 16 else a @ b


def _column_products(a: Tensor, b: Tensor, rows: int = 256) -> Tensor:
    """Return the dot product of each column of a and b, both (rows, width); on a CPU, summed in cache-sized pieces."""
    if not a.is_cpu or len(a) <= rows:
        return (a * b).sum(0)
    total = a[:rows] * b[:rows]
    for x, y in zip(a[rows:].split(rows), b[rows:].split(rows)):
        total[: len(x)].addcmul_(x, y)
    return total.sum(0)


def correlate(
    x: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """Convolve without bias, in the dtype that autocast chooses; without autocast, in that of the weight."""
    if x.dtype != weight.dtype and not _autocasts(x):
        x = x.to(weight.dtype)
    return CONVOLUTIONS[weight.dim() - 2](x, weight, None, stride, padding, dilation, groups)


def convolve(module: Any, x: Tensor, weight: Tensor, groups: int | None = None) -> Tensor:
    """Apply a module's convolution with another weight, without bias: same stride, padding and dilation."""
    padding = module.padding
    if module.padding_mode != "zeros":
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    return correlate(x, weight, module.stride, padding, module.dilation, groups or module.groups)


def mix_channels(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Apply a convolution with kernel size 1."""
    return correlate(x, weight, groups=groups)


def look_up(module: Any, ids: Tensor, table: Tensor) -> Tensor:
    """Look up rows of a table (vocabulary, features) as the embedding `module` does in its own."""
    found = nn.functional.embedding(
        ids, table, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq
    )
    scale = getattr(module, "embed_scale", None)  # of embeddings that scale their output
    return found if scale is None else found * scale


def apply(weight: Weight, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
    """Apply `module`, which holds `weight`, to x with `matrix` (in the layout of W) instead and no bias."""
    if weight.kind == "conv":
        return convolve(module, x, matrix)
    if weight.kind == "embedding":
        return look_up(module, x, matrix.T)
    return multiply(x, matrix)
