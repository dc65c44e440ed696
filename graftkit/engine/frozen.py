"""What is frozen is computed once.

The longest prefix of the network that no trained parameter touches gives the same output for a row in every
epoch. It runs in eval mode and without gradients; its outputs are kept, and later passes start at the first
trained block, or at the head. They are computed in batches that depend on the data alone, so a resumed run
finds the same values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.data.batches import ordered_batches
from graftkit.engine.precision import autocast
from graftkit.graft import Graft
from graftkit.methods.head import PooledHead
from graftkit.tasks.base import Batch, Dataset

MEMORY_SHARE = 0.25  # of the machine's memory that kept outputs may take
FILL_BATCH = 64


def frozen_depth(graft: Graft) -> int:
    """How many leading blocks no trained parameter lies in or before; all of them for a head alone."""
    backbone = graft.backbone
    order = {name: i for i, (name, _) in enumerate(backbone.model.named_modules())}
    count = len(backbone.blocks)
    depth = count
    for name, group in graft.labels.items():
        owner = name.rpartition(".")[0]
        block = _block_of(owner, backbone.blocks)
        if block is not None:
            depth = min(depth, block)
        elif group.role != "head" and (
            count == 0 or owner.endswith(f"_{graft.name}") or order[owner] < order[backbone.blocks[0]]
        ):
            return 0
    return depth


def _block_of(name: str, blocks: tuple[str, ...]) -> int | None:
    return next((i for i, block in enumerate(blocks) if name == block or name.startswith(block + ".")), None)


def set_training(graft: Graft, depth: int) -> None:
    """Training mode for what lies behind the frozen prefix; eval mode for the prefix and for frozen statistics."""
    backbone = graft.backbone
    backbone.model.train()
    trained_owners = {name.rpartition(".")[0] for name in graft.labels}
    names = [name for name, _ in backbone.model.named_modules()]
    first = names.index(backbone.blocks[0]) if backbone.blocks else 0
    for position, (name, module) in enumerate(backbone.model.named_modules()):
        if hasattr(module, "running_mean") and name not in trained_owners:
            module.training = False
        if depth == 0 or name == "":
            continue
        block = _block_of(name, backbone.blocks)
        above = any(b.startswith(name + ".") for b in backbone.blocks[:1])
        if (block is not None and block < depth) or (block is None and not above and position < first):
            module.training = False


def pooled_head(graft: Graft) -> PooledHead | None:
    """The head that the graft placed on the model, if it is one of ours."""
    return next((module for _, module in graft.additions() if isinstance(module, PooledHead)), None)


class Forward:
    """Logits (rows, classes) of a batch: the model called as it is."""

    def __init__(self, graft: Graft, device: torch.device, precision: str) -> None:
        self.graft = graft
        self.device = device
        self.precision = precision

    def __call__(self, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        with autocast(self.device, self.precision):
            return self.graft.model(**batch.inputs).logits


class CachedForward(Forward):
    """The same from kept outputs of the frozen prefix: features of a head alone, or the input of a block."""

    def __init__(
        self, graft: Graft, device: torch.device, precision: str, depth: int, dataset: Dataset
    ) -> None:
        super().__init__(graft, device, precision)
        backbone = graft.backbone
        self.blocks = [backbone.module(name) for name in backbone.blocks]
        self.depth = depth
        self.head = pooled_head(graft) if depth == len(self.blocks) else None
        self.offsets = np.concatenate([[0], np.cumsum(dataset.encoded.lengths)])
        self.kept = self._fill(dataset)

    def __call__(self, batch: Batch) -> Tensor:
        if self.head is not None:
            return self.head.logits(self.kept[torch.from_numpy(batch.rows)].to(self.device))
        batch = batch.to(self.device)
        states = self._states(batch).to(self.device)
        with _skipping(self.blocks, self.depth, states), autocast(self.device, self.precision):
            return self.graft.model(**batch.inputs).logits

    def _states(self, batch: Batch) -> Tensor:
        """Kept states (rows, length, width) of the batch's rows, zero where there is padding."""
        width = batch.inputs["input_ids"].shape[1]
        states = self.kept.new_zeros(len(batch.rows), width, self.kept.shape[1])
        for i, row in enumerate(batch.rows):
            part = self.kept[self.offsets[row] : self.offsets[row + 1]]
            states[i, : len(part)] = part
        return states

    @torch.no_grad()
    def _fill(self, dataset: Dataset) -> Tensor:
        model = self.graft.model
        was_training = model.training
        model.eval()
        kept: Tensor | None = None
        for rows in ordered_batches(dataset.encoded.lengths, FILL_BATCH):
            batch = dataset.batch(rows).to(self.device)
            values = self._capture(batch)
            if self.head is not None:
                kept = values.new_empty(len(dataset), values.shape[1]) if kept is None else kept
                kept[torch.from_numpy(rows)] = values
                continue
            kept = values.new_empty(int(self.offsets[-1]), values.shape[2]) if kept is None else kept
            for i, row in enumerate(rows):
                start, end = self.offsets[row], self.offsets[row + 1]
                kept[start:end] = values[i, : end - start]
        model.train(was_training)
        assert kept is not None
        return kept

    def _capture(self, batch: Batch) -> Tensor:
        """What comes in at the head (rows, width) or at the first trained block (rows, length, width), on the CPU."""
        got: list[Tensor] = []
        with autocast(self.device, self.precision):
            if self.head is not None:
                with _grabbing(self.head, got):
                    self.graft.model(**batch.inputs)
            else:
                handle = self.blocks[self.depth].register_forward_pre_hook(_stop_with(got), with_kwargs=True)
                try:
                    self.graft.model(**batch.inputs)
                except _Captured:
                    pass
                finally:
                    handle.remove()
        return got[0].cpu()


def make_forward(
    graft: Graft, device: torch.device, precision: str, depth: int, dataset: Dataset, passes: int
) -> Forward:
    """A forward function for one dataset that is read `passes` times: cached where that is possible and pays."""
    if depth == len(graft.backbone.blocks) and not _only_head_trains(graft):
        depth -= 1  # what follows the last block is trained: its output is computed anew from its kept input
    if (
        depth == 0
        or passes < 2
        or not _fits(graft, dataset, depth)
        or not _blocks_give_tensors(graft, dataset, device, precision)
    ):
        return Forward(graft, device, precision)
    return CachedForward(graft, device, precision, depth, dataset)


def _only_head_trains(graft: Graft) -> bool:
    """Whether all that is trained comes after the pooled features, which then never change."""
    head = pooled_head(graft)
    if head is None or head.pooling == "attention":
        return False
    own = {id(parameter) for parameter in head.parameters()}
    return all(id(parameter) in own for parameter in graft.parameters.values())


def _fits(graft: Graft, dataset: Dataset, depth: int) -> bool:
    width = graft.backbone.hidden_size
    rows = len(dataset) if depth == len(graft.backbone.blocks) else int(dataset.encoded.lengths.sum())
    return rows * width * 4 < MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _blocks_give_tensors(graft: Graft, dataset: Dataset, device: torch.device, precision: str) -> bool:
    """Whether a block returns its states alone, so that it can be passed by."""
    kinds: list[bool] = []
    block = graft.backbone.module(graft.backbone.blocks[0])
    handle = block.register_forward_hook(
        lambda module, args, output: kinds.append(isinstance(output, Tensor))
    )
    try:
        with torch.no_grad():
            Forward(graft, device, precision)(dataset.batch(np.array([0])))
    finally:
        handle.remove()
    return kinds == [True]


class _Captured(Exception):
    pass


def _stop_with(got: list[Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        got.append(args[0] if args else kwargs["hidden_states"])
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
