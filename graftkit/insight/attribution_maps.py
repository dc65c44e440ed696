"""Attribution from inside a model: its last feature maps, or its attention probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone.anatomy import is_conv
from graftkit.backbone.attention import AddedKeysValues
from graftkit.backbone.backbone import Backbone
from graftkit.backbone.tokens import VirtualTokens
from graftkit.backbone.walk import modules_of
from graftkit.insight.attribution_inputs import RowInput, Unfit
from graftkit.libraries import attention_of, set_attention


def grad_cam(row: RowInput) -> Tensor:
    """Return the positive part of the last feature maps' sum, each weighted by its mean gradient, at the size of the image,
    (1, height, width) (Grad-CAM: Selvaraju et al. 2017, equations 1 and 2)."""
    backbone = row.forward.graft.backbone
    if not row.is_image:
        kind = "tokens" if row.is_text else "sounds"
        raise Unfit(f"grad_cam explains images by feature maps, but {backbone.source} reads {kind} here.")
    for module in _last_maps(backbone):
        got: list[Tensor] = []
        with torch.enable_grad(), _keeping(module, got):
            value = row(row.values.detach().requires_grad_()).sum()
            if len(got) != 1 or got[0].dim() != 4 or got[0].shape[-1] * got[0].shape[-2] == 1:
                continue
            gradient = torch.autograd.grad(value, got[0])[0]
        maps = (got[0] * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu().detach()
        size = row.values.shape[-2:]
        return nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)[:, 0]
    raise Unfit(
        f"grad_cam needs feature maps (channels, height, width), which no last block or convolution of {backbone.source} gives."
    )


def attention(row: RowInput) -> Tensor:
    """Return how the input's tokens flow into the answer through the attention of all layers, each weighted by its
    gradient: (1, height, width) for an image of patches, (1, length, 1) for a text.

    R = I, then R += A R for each layer, with A = mean over heads of (gradient * attention)+ (Chefer et al. 2021, "Generic
    Attention-model Explainability", equations 5 and 6). The rows of R - I that the head reads are averaged, weighted by the norm
    of their gradient at the last block: for a class token this is its row, for mean pooling the mean.
    """
    backbone = row.forward.graft.backbone
    side = _patch_of(row, backbone)
    added = [m for m in modules_of(backbone.model).values() if isinstance(m, AddedKeysValues | VirtualTokens)]
    if added:
        raise Unfit(
            "attention: this run has trained tokens beside those of the input; use integrated_gradients."
        )
    if not backbone.blocks or not hasattr(backbone.model, "set_attn_implementation"):
        raise Unfit(
            f"attention needs a transformers model with attention probabilities, which {backbone.source} does not show."
        )
    got: list[Tensor] = []
    last: list[Tensor] = []
    with torch.enable_grad(), _eager(backbone.model), ExitStack() as stack:
        for module in modules_of(backbone.model).values():
            stack.enter_context(_attending(module, got))
        stack.enter_context(_keeping(backbone.module(backbone.blocks[-1]), last))
        value = row(row.values.detach().requires_grad_()).sum()
        size = last[0].shape[1] if len(last) == 1 and last[0].dim() == 3 else 0
        if not got or any(one.shape[-2:] != (size, size) or len(one) != 1 for one in got):
            raise Unfit(
                f"attention needs layers in which each token attends to all {size or ''} tokens, which those of "
                f"{backbone.source} do not show."
            )
        gradients = torch.autograd.grad(value, [last[0], *got], allow_unused=True)
    relevance = torch.eye(size, device=got[0].device)
    for one, gradient in zip(got, gradients[1:]):
        if gradient is not None:
            relevance = relevance + (gradient * one).detach().clamp(min=0).mean(1)[0] @ relevance
    assert gradients[0] is not None
    read = gradients[0][0].norm(dim=-1)
    flow = (read / read.sum()) @ (relevance - torch.eye(size, device=relevance.device))
    if row.is_text:
        if size != row.values.shape[1]:
            raise Unfit(
                f"attention: {backbone.source} reads {size} tokens where the text has {row.values.shape[1]}."
            )
        return flow[None, :, None]
    assert side is not None
    height, width = row.values.shape[-2:]
    rows, columns = height // side, width // side
    if rows * columns > size:
        raise Unfit(
            f"attention: {backbone.source} reads {size} tokens, fewer than the {rows * columns} patches."
        )
    patches = flow[size - rows * columns :].reshape(1, 1, rows, columns)
    return nn.functional.interpolate(patches, size=(height, width), mode="nearest")[:, 0]


def _patch_of(row: RowInput, backbone: Backbone) -> int | None:
    """Return the side of the patches of an image, None for a text. Raises `Unfit` for anything else."""
    patch = getattr(getattr(backbone.model, "config", None), "patch_size", None)
    if row.is_text or (row.is_image and isinstance(patch, int)):
        return patch
    what = "no patches of images (patch_size in its config)" if row.is_image else "sounds here"
    raise Unfit(f"attention is for texts and images of patches, but {backbone.source} reads {what}.")


def _last_maps(backbone: Backbone) -> Iterator[nn.Module]:
    """Yield the last block; of a model without blocks, the last convolution before the head. (Before blocks of tokens there
    may be a convolution too: the one that made the tokens.)"""
    if backbone.blocks:
        yield backbone.module(backbone.blocks[-1])
        return
    yield from [site.module for site in backbone.sites if is_conv(site.module) and site.role != "head"][-1:]


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[nn.Module, tuple, Any], None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _keeping(module: nn.Module, got: list[Tensor]) -> Iterator[None]:
    """Keep the first tensor of each output of a module."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, Tensor):
            got.append(first)

    with _hooked(module, hook):
        yield


@contextmanager
def _attending(module: nn.Module, got: list[Tensor]) -> Iterator[None]:
    """Keep the attention probabilities (1, heads, length, length) that a module returns beside its states."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        second = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(second, Tensor) or second.dim() != 4 or not second.requires_grad:
            return
        if all(second is not one for one in got):  # a module around it returns it too
            got.append(second)

    with _hooked(module, hook):
        yield


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Compute attention step by step, so that its probabilities exist; on exit the model's own function is back."""
    before = attention_of(model)
    set_attention(model, "eager")
    try:
        yield
    finally:
        set_attention(model, before)
