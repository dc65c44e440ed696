"""What is frozen is computed once.

The outputs of the frozen prefix are kept, and later passes start at the first trained block, or at the head. They
are computed in batches that depend on the data alone, so a resumed run finds the same values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.data.batches import ordered_batches
from graftkit.engine.frozen import Phase, only_head_trains, pooled_head
from graftkit.engine.kept import Kept
from graftkit.engine.precision import autocast
from graftkit.graft import Graft
from graftkit.methods.base import Labels
from graftkit.methods.head import PooledHead
from graftkit.tasks.base import Batch, Dataset

MEMORY_SHARE = 0.25  # of the machine's memory that kept outputs may take
FILL_BATCH = 64
SAME = 1e-3  # largest difference of a logit, as a share of the largest, that padding and bf16 may make


class Forward:
    """What the task's loss and outcomes are computed from, of a batch: the model called as it is."""

    def __init__(self, graft: Graft, device: torch.device, precision: str) -> None:
        self.graft = graft
        self.device = device
        self.precision = precision

    def __call__(self, batch: Batch) -> Tensor:
        with autocast(self.device, self.precision):
            return batch.dataset.logits(self.graft.model, batch)

    def enter(self, phase: Phase) -> None:
        """Told by the loop where other parameters are trained from now on; for most methods there is one phase."""


class PhasedForward(Forward):
    """The same where a method frees parameters one after another: kept outputs are those of today's frozen prefix."""

    def __init__(
        self, graft: Graft, device: torch.device, precision: str, dataset: Dataset, per_epoch: int
    ) -> None:
        super().__init__(graft, device, precision)
        self.dataset = dataset
        self.per_epoch = per_epoch
        self.inner = Forward(graft, device, precision)

    def __call__(self, batch: Batch) -> Tensor:
        return self.inner(batch)

    def enter(self, phase: Phase) -> None:
        self.inner = Forward(self.graft, self.device, self.precision)  # lets go of what was kept
        self.inner = make_forward(
            self.graft, self.device, self.precision, phase.depth, self.dataset,
            math.ceil((phase.end - phase.start) / self.per_epoch), phase.labels,
        )  # fmt: skip


class CachedForward(Forward):
    """The same from kept outputs of the frozen prefix: features of a head alone, or the input of block `depth`."""

    def __init__(
        self, graft: Graft, device: torch.device, precision: str, depth: int, dataset: Dataset, features: bool
    ) -> None:
        super().__init__(graft, device, precision)
        backbone = graft.backbone
        self.blocks = [backbone.module(name) for name in backbone.blocks]
        self.depth = depth
        self.head = pooled_head(graft) if features else None
        pooled = self.head is not None and self.head.pooling != "tokens"
        self.kept = Kept(dataset.lengths, ragged=not (pooled or dataset.uniform))
        with _evaluating(graft.model), torch.no_grad():
            for rows in ordered_batches(dataset.lengths, FILL_BATCH):
                self.kept.put(rows, self._capture(dataset.batch(rows, device)))

    def __call__(self, batch: Batch) -> Tensor:
        states = self.kept.get(batch.rows).to(self.device)
        if self.head is not None:
            return self.head.logits(states)
        with _skipping(self.blocks, self.depth, states):
            return super().__call__(batch)

    def _capture(self, batch: Batch) -> Tensor:
        """What comes in at the head (rows, width), or at the first trained block (rows, length, width)."""
        got: list[Tensor] = []
        if self.head is not None:
            with _grabbing(self.head, got):
                super().__call__(batch)
            return got[0]
        handle = self.blocks[self.depth].register_forward_pre_hook(_stop_with(got), with_kwargs=True)
        try:
            super().__call__(batch)
        except _Captured:
            pass
        finally:
            handle.remove()
        return got[0]


def make_forward(
    graft: Graft,
    device: torch.device,
    precision: str,
    depth: int,
    dataset: Dataset,
    passes: int,
    labels: Labels | None = None,
) -> Forward:
    """A forward function for one dataset that is read `passes` times: cached where that is possible and pays.

    `labels`: what is trained while it is used; all that the graft labels by default.
    """
    plain = Forward(graft, device, precision)
    features = only_head_trains(graft, graft.labels if labels is None else labels)
    if passes < 2 or not dataset.keeps:
        return plain
    if features:
        head = pooled_head(graft)
        assert head is not None
        size = head.width * (int(dataset.lengths.sum()) if head.pooling == "tokens" else len(dataset))
    else:
        depth = min(depth, len(graft.backbone.blocks) - 1)  # what follows the last block is computed anew
        found = _passed_on(plain, depth, dataset) if depth > 0 else None
        if found is None:
            return plain
        size = found
    if size * 4 >= MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return plain
    return CachedForward(graft, device, precision, depth, dataset, features)


def _passed_on(plain: Forward, depth: int, dataset: Dataset) -> int | None:
    """Numbers in the input of block `depth` for all rows, where this is all that the blocks before it are for; else None.

    Found by trying it on the longest and the shortest row: nothing trained lies before it, each of these blocks is
    called once, gives its states alone, and these are what the next is given; without them the result is the same.
    It is not so where a decoder looks at all of an encoder, or where something lies between the blocks.
    """
    lengths = dataset.lengths
    batch = dataset.batch(np.unique([lengths.argmax(), lengths.argmin()]), plain.device)
    blocks = [plain.graft.backbone.module(name) for name in plain.graft.backbone.blocks]
    entered: list[tuple[int, Any]] = []
    left: list[tuple[int, Any]] = []
    handles = []
    for i, block in enumerate(blocks[: depth + 1]):
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: entered.append((i, _entering(args, kwargs))), with_kwargs=True
            )
        )
        handles.append(block.register_forward_hook(lambda _, args, output, i=i: left.append((i, output))))
    try:
        with _evaluating(plain.graft.model):
            wanted = plain(batch).detach()
    finally:
        for handle in handles:
            handle.remove()
    states = entered[-1][1] if entered else None
    in_order = [i for i, _ in entered] == list(range(depth + 1)) == [i for i, _ in left]
    linked = in_order and all(left[i][1] is entered[i + 1][1] for i in range(depth))
    if not linked or not isinstance(states, Tensor) or states.requires_grad or len(states) != len(batch.rows):
        return None
    if not dataset.uniform and (states.dim() != 3 or states.shape[1] != lengths[batch.rows].max()):
        return None
    states = states.clone()
    for i, row in enumerate(batch.rows if not dataset.uniform else ()):
        states[i, lengths[row] :] = 0
    with _evaluating(plain.graft.model), torch.no_grad(), _skipping(blocks, depth, states):
        got = plain(batch)
    if (got - wanted).abs().max() > SAME * wanted.abs().max():
        return None
    return states[0].numel() * len(dataset) if dataset.uniform else int(lengths.sum()) * states.shape[2]


def _entering(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The states that a block is given, first in its arguments or by their usual name."""
    return args[0] if args else kwargs.get("hidden_states")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode, and afterwards in the modes that they had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Captured(Exception):
    pass


def _stop_with(got: list[Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        got.append(_entering(args, kwargs))
        raise _Captured

    return hook


@contextmanager
def _grabbing(head: PooledHead, got: list[Tensor]) -> Iterator[None]:
    plain = head.logits

    def logits(features: Tensor) -> Tensor:
        got.append(features)
        return plain(features)

    head.logits = logits  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.logits


@contextmanager
def _skipping(blocks: list[nn.Module], depth: int, states: Tensor) -> Iterator[None]:
    """Blocks before `depth` return what they are given; block `depth` starts from `states`."""

    def start(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states}

    def pass_by(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    handle = blocks[depth].register_forward_pre_hook(start, with_kwargs=True)
    for block in blocks[:depth]:
        block.forward = pass_by  # type: ignore[method-assign]
    try:
        yield
    finally:
        handle.remove()
        for block in blocks[:depth]:
            del block.forward
