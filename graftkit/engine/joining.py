"""Join the layers of a model that read one input, and the parts of a block, for the time of a run."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from graftkit.data.source import Pass, Source
from graftkit.engine.forward import Forward, evaluating
from graftkit.engine.fused_blocks import FusedBlock, fuse
from graftkit.engine.precision import autocast
from graftkit.methods.shared import joined


class Joining(joined.Joining):
    """Linear layers that are joined, and blocks that are one operation, between `enter` and `leave`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.fused: list[FusedBlock] = []

    def leave(self) -> None:
        for fused in self.fused:
            vars(fused.block).pop("forward", None)
        self.fused = []
        super().leave()


def join(joining: Joining, source: Source, forward: Forward, depth: int = 0) -> None:
    """Join what can be joined now. Which layers read the same input is seen on the first row, in eval mode and without
    gradients, so that a resumed run joins the same. A model that cannot take a single row leaves the rest apart.

    `depth`: the number of leading blocks that are frozen, which have no gradient.
    """

    def call() -> Any:
        device = forward.device
        cuda = [device] if device.type == "cuda" else []
        with suppress(Exception), torch.random.fork_rng(devices=cuda), evaluating(forward.graft.model):
            batch = source.batch(np.zeros(1, dtype=np.int64), device, Pass())
            forward.prepare(batch)
            return forward(batch)

    joining.enter(torch.no_grad()(call))
    if forward.device.type == "cpu" and torch.is_grad_enabled():
        backbone = forward.graft.backbone
        blocks = [backbone.module(name) for name in backbone.blocks[depth:]]
        computing = lambda: autocast(forward.device, forward.precision)  # noqa: E731
        joining.fused = fuse(blocks, joining.sites, call, computing)
        joining.groups += [group for fused in joining.fused for group in fused.groups]
