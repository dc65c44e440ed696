"""Cache the activations of the frozen prefix.

They are computed once, and later passes start at the first trained block, or at the head. They are computed in batches
that depend on the data alone, so a resumed run finds the same values.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from graftkit.data.order import ordered_batches
from graftkit.data.source import Batch
from graftkit.engine.forward import Forward, evaluating
from graftkit.engine.frozen import Phase
from graftkit.engine.kept import Kept
from graftkit.engine.memory import host_memory, in_parts
from graftkit.engine.parallel import all_agree, processes
from graftkit.engine.starts import Start, find_start
from graftkit.grafts.graft import Graft
from graftkit.optim.labels import Labels
from graftkit.tasks.base import Dataset

MEMORY_SHARE = 0.25  # of the memory that this process may use which cached activations may take
ADVICE = "lower data.max_length."
FILL_BATCH = 64


class PhasedForward(Forward):
    """The forward pass for gradual unfreezing: caches the activations of the current frozen prefix."""

    def __init__(
        self, graft: Graft, device: torch.device, precision: str, dataset: Dataset, per_epoch: int
    ) -> None:
        super().__init__(graft, device, precision)
        self.dataset = dataset
        self.per_epoch = per_epoch
        self.inner = Forward(graft, device, precision)

    def __call__(self, batch: Batch) -> Tensor:
        return self.inner(batch)

    @property
    def reads_inputs(self) -> bool:
        return self.inner.reads_inputs

    def enter(self, phase: Phase) -> None:
        self.inner = Forward(self.graft, self.device, self.precision)  # frees the old cache
        self.inner = make_forward(
            self.graft, self.device, self.precision, phase.depth, self.dataset,
            math.ceil((phase.end - phase.start) / self.per_epoch), phase.labels,
        )  # fmt: skip


class CachedForward(Forward):
    """The forward pass from cached activations of the frozen prefix, from `start` on."""

    def __init__(
        self, graft: Graft, device: torch.device, precision: str, dataset: Dataset, start: Start
    ) -> None:
        super().__init__(graft, device, precision)
        self.start = start
        self.plain = Forward(graft, device, precision)
        self.kept = Kept(dataset.lengths, ragged=start.per_token and not dataset.uniform)
        self._fill(dataset)

    @torch.no_grad()
    def _fill(self, dataset: Dataset) -> None:
        """Fill the cache: each process computes a share of the batches, and all exchange their results."""
        index, world = processes()

        def capture(rows: np.ndarray) -> Tensor:
            return self.start.capture(self.plain, dataset.batch(rows, self.device))

        with evaluating(self.graft.model):
            for batch in ordered_batches(dataset.lengths, FILL_BATCH)[index::world]:
                for rows, values in in_parts(batch, self.device, capture, ADVICE):
                    self.kept.put(rows, values)
        if world > 1:
            self.kept.exchange()

    @property
    def reads_inputs(self) -> bool:
        return self.start.reads_inputs

    def __call__(self, batch: Batch) -> Tensor:
        return self.start.resume(self.plain, batch, self.kept.get(batch.rows).to(self.device))


def make_forward(
    graft: Graft,
    device: torch.device,
    precision: str,
    depth: int,
    dataset: Dataset,
    passes: int,
    labels: Labels | None = None,
) -> Forward:
    """Return a forward function for a dataset that is read `passes` times: cached if that is possible and worthwhile.

    `labels`: the parameters trained while it is used; by default all that the graft labels.
    """
    plain = Forward(graft, device, precision)
    labels = graft.labels if labels is None else labels
    if passes < 2 or not dataset.keeps:
        return plain
    found = find_start(plain, depth, dataset, labels)
    fits = found is not None and found[1] * 4 < MEMORY_SHARE * host_memory()
    if not all_agree(fits):
        return plain
    assert found is not None
    start, _ = found
    return CachedForward(graft, device, precision, dataset, start)
