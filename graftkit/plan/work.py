"""The arithmetic of a training step that its model needs, counted from shapes: model FLOPs, not those that happen to be done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from graftkit.backbone.sites import Site
from graftkit.backbone.weights import weights_at
from graftkit.grafts.graft import Graft

FORMULA = (
    "2 FLOPs a weight and token forward, 2 for the gradient of the input of each layer above the lowest trained one, 2 for the "
    "gradient of each trained weight; attention 4 L^2 width a row forward (half of it if causal) and twice that backward. "
    "Embeddings, norms, recomputation and padding count nothing. LoRA on all layers is about (2 + trained/frozen)/3 of full training"
)


@dataclass(frozen=True)
class Product:
    """A weight matrix (out, in) of a block: how many such, and how many of them pass gradients on."""

    out: int
    inside: int
    block: int
    trained: bool


def products(graft: Graft) -> Iterator[Product]:
    """Yield the matrices of the linear layers in the blocks, without experts, of which only some see a token."""
    for site in graft.backbone.sites:
        if site.block is not None:
            yield from _of(site, graft)


def _of(site: Site, graft: Graft) -> Iterator[Product]:
    for weight in weights_at(graft.backbone, site):
        if weight.kind in ("linear", "transposed", "packed"):
            name = f"{site.name}.{weight.parameter}"
            yield Product(weight.shape[-2], weight.shape[-1], int(site.block or 0), name in graft.labels)


def flops_of(graft: Graft, depth: int, lengths: np.ndarray, scored: float) -> float:
    """Return the model FLOPs of a step; see `FORMULA`.

    `depth`: the number of leading frozen blocks, which pass no gradients on. `lengths`: (rows,) tokens of each row, without
    padding. `scored`: the number of tokens that go through the model's output layer; 0 if it has a head for rows.
    """
    tokens, total = float(lengths.sum()), 0.0
    for one in products(graft):
        passes = 1 + (one.block >= depth) + one.trained
        total += 2 * passes * one.out * one.inside * tokens
    for _, module in graft.additions():
        if not module.survives_fold:  # a head works on rows
            total += sum(6 * p.numel() * tokens for p in module.parameters() if p.dim() == 2)
    per_row = 4 * float((lengths.astype(float) ** 2).sum()) * (0.5 if graft.backbone.is_decoder else 1.0)
    for block, width in _widths(graft).items():
        total += per_row * width * (3 if block >= depth else 1)
    return total + scored * _output_layer(graft)


def _widths(graft: Graft) -> dict[int, int]:
    """Return the width of the queries, all heads together, of each block that has attention."""
    found: dict[int, int] = {}
    for site in graft.backbone.sites:
        if site.block is not None and site.role in ("q", "qkv"):
            for weight in weights_at(graft.backbone, site):
                found[site.block] = weight.shape[-2] // (3 if site.role == "qkv" else 1)
    return found


def _output_layer(graft: Graft) -> float:
    """Return the FLOPs of the output layer for a token: its weight forward and backward, and its gradient if it is trained."""
    layer = getattr(graft.model, "get_output_embeddings", lambda: None)()
    weight = getattr(layer, "weight", None)
    if weight is None:
        return 0.0
    trained = any(p is weight and name in graft.labels for name, p in graft.model.named_parameters())
    return 2.0 * weight.numel() * (2 + trained)
