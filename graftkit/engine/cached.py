"""Cache the activations of the frozen prefix.

They are computed once, and later passes start at the first trained block, or at the head. They are computed in batches
that depend on the data alone, so a resumed run finds the same values. Files keep them for later runs (`engine.filling`).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.data.order import ordered_batches
from graftkit.data.source import Batch, Pass
from graftkit.engine.blocks import Blocks, room
from graftkit.engine.filling import ADVICE, FILL_BATCH, Filled, Filling, NotKept
from graftkit.engine.fingerprint import digests_of, key_of
from graftkit.engine.forward import Forward, evaluating
from graftkit.engine.frozen import Phase
from graftkit.engine.kept import Kept
from graftkit.engine.machine import synchronize
from graftkit.engine.memory import host_memory, in_parts
from graftkit.engine.parallel import all_agree
from graftkit.engine.starts import Start, find_start
from graftkit.errors import Note
from graftkit.grafts.graft import Graft
from graftkit.optim.labels import Labels
from graftkit.tasks.base import Dataset

MEMORY_SHARE = 0.25  # of the memory that this process may use which cached activations may take


@dataclass(frozen=True)
class Caching:
    """Where activations are kept: `mode` is train.cache of a recipe. `seed`: of the views of augmented rows. `later`: rows
    that are read once are kept too, for later runs, if there are files. `written`: files are written however little work
    they save."""

    mode: str = "auto"
    seed: int = 0
    later: bool = False
    written: bool = False


class PhasedForward(Forward):
    """The forward pass for gradual unfreezing: caches the activations of the current frozen prefix."""

    def __init__(
        self, graft: Graft, device: torch.device, precision: str, dataset: Dataset, per_epoch: int,
        caching: Caching = Caching(),
    ) -> None:  # fmt: skip
        super().__init__(graft, device, precision)
        self.dataset = dataset
        self.per_epoch = per_epoch
        self.caching = caching
        self.inner = Forward(graft, device, precision)

    def __call__(self, batch: Batch) -> Tensor:
        return self.inner(batch)

    @property
    def reads_inputs(self) -> bool:
        return self.inner.reads_inputs

    @property
    def filled(self) -> Filled | None:
        return self.inner.filled

    def prepare(self, batch: Batch) -> None:
        self.inner.prepare(batch)

    def enter(self, phase: Phase) -> None:
        self.inner = Forward(self.graft, self.device, self.precision)  # frees the old cache
        self.inner = make_forward(
            self.graft, self.device, self.precision, phase.depth, self.dataset,
            math.ceil((phase.end - phase.start) / self.per_epoch), phase.labels, self.caching,
        )  # fmt: skip


class CachedForward(Forward):
    """The forward pass from cached activations of the frozen prefix, from `start` on.

    `in_memory`: hold all of them, otherwise map their files; `blocks`: these files, if there are any. Raises `NotKept` if
    the files cannot be written and memory is too small.
    """

    def __init__(
        self, graft: Graft, device: torch.device, precision: str, dataset: Dataset, start: Start,
        blocks: Blocks | None = None, in_memory: bool = True, seed: int = 0, written: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(graft, device, precision)
        self.start, self.seed = start, seed
        self.plain = Forward(graft, device, precision)
        self.rows, self.views = len(dataset), dataset.views
        self.dataset = dataset
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        ragged = start.per_token and not dataset.uniform
        lengths = np.tile(dataset.lengths, dataset.views)
        filling = Filling(self._capture, lengths, ragged, blocks, device, in_memory, precision, written)
        with torch.no_grad(), evaluating(graft.model):
            self.kept, self._filled = filling.run()

    @property
    def filled(self) -> Filled:
        return self._filled

    @property
    def light(self) -> bool:
        return self.stream is None and isinstance(self.kept, Kept) and not self.reads_inputs

    def _capture(self, places: np.ndarray) -> Tensor:
        """Return the activations of the rows at these places: row + view * number of rows."""
        made = []
        for view in np.unique(places // self.rows):
            rows = places[places // self.rows == view] - view * self.rows
            batch = self.dataset.batch(rows, self.device, Pass(self.seed, int(view)))
            made.append(self.start.capture(self.plain, batch))
        return made[0] if len(made) == 1 else torch.cat(made)

    @property
    def reads_inputs(self) -> bool:
        return self.start.reads_inputs

    def prepare(self, batch: Batch) -> None:
        """Fetch the activations too. On a GPU they are copied from pinned memory, on a stream beside that of the step."""
        super().prepare(batch)
        states, copied = self._read(batch), None
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                states = states.pin_memory().to(self.device, non_blocking=True)
                copied = self.stream.record_event()
        batch.fetched = self, states, copied

    def __call__(self, batch: Batch) -> Tensor:
        if batch.fetched is None or batch.fetched[0] is not self:  # perhaps for the cache of the phase before
            batch.fetched = self, self._read(batch), None
        _, states, copied = batch.fetched
        if copied is not None:
            step = torch.cuda.current_stream(self.device)
            step.wait_event(copied)
            states.record_stream(step)
        return self.start.resume(self.plain, batch, states.to(self.device))

    def _read(self, batch: Batch) -> Tensor:
        return self.kept.get(batch.rows + batch.at.epoch % self.views * self.rows)


@dataclass(frozen=True)
class Cacheable:
    """What a pass over some rows may start from: `start`, the `bytes` of its values at most, their files if there are any, and
    whether memory holds them all."""

    start: Start
    bytes: int
    blocks: Blocks | None
    in_memory: bool

    def missing(self, dataset: Dataset) -> int:
        """Return how many values of rows no file holds yet."""
        found = 0 if self.blocks is None else sum(len(block.rows) for block in self.blocks.find())
        return len(dataset) * dataset.views - found


def cacheable(
    plain: Forward, depth: int, dataset: Dataset, passes: int, labels: Labels, caching: Caching
) -> Cacheable | None:
    """Return where passes over a dataset that is read `passes` times start from cached values; None if they do not.

    `labels`: the parameters trained while it is used.
    """
    once = passes <= dataset.views
    if not dataset.keeps or caching.mode == "none" or (once and not caching.later):
        return None
    found = find_start(plain, depth, dataset, labels)
    if not all_agree(found is not None):
        return None
    assert found is not None
    start, size = found
    size *= 4 * dataset.views  # bytes, at most
    in_memory = caching.mode != "disk" and all_agree(size < MEMORY_SHARE * host_memory())
    blocks = None
    if caching.mode != "memory" and all_agree(size < room()):
        blocks = _blocks(plain, start, dataset, caching.seed)
    if not all_agree(blocks is not None or (in_memory and not once)):
        if not once:
            warnings.warn(
                Note(f"outputs of frozen layers are computed in each pass: {_too_large(size)}."), stacklevel=2
            )
        return None
    if plain.device.type == "cuda" and not all_agree(_pays(plain, start, dataset)):
        return None
    return Cacheable(start, size, blocks, in_memory)


def make_forward(
    graft: Graft,
    device: torch.device,
    precision: str,
    depth: int,
    dataset: Dataset,
    passes: int,
    labels: Labels | None = None,
    caching: Caching = Caching(),
) -> Forward:
    """Return a forward function for a dataset that is read `passes` times: cached if that is possible and worthwhile.

    `labels`: the parameters trained while it is used; by default all that the graft labels.
    """
    plain = Forward(graft, device, precision)
    found = cacheable(plain, depth, dataset, passes, graft.labels if labels is None else labels, caching)
    if found is None:
        return plain
    try:
        where = graft, device, precision
        return CachedForward(
            *where, dataset, found.start, found.blocks, found.in_memory, caching.seed, caching.written
        )
    except NotKept:
        return plain


def _too_large(size: float) -> str:
    return f"they take up to {size / 1e9:,.1f} GB, and there is no room for them in memory or in the cache folder"


def _blocks(plain: Forward, start: Start, dataset: Dataset, seed: int) -> Blocks | None:
    """Return the files that keep the activations of these rows; None if it cannot be told what they depend on."""
    digests = digests_of(dataset, seed)
    key = None if digests is None else key_of(plain, start, dataset)
    if digests is None or key is None:
        return None
    ragged = start.per_token and not dataset.uniform
    spans = np.tile(dataset.lengths, dataset.views) if ragged else np.ones(len(digests), np.int64)
    return Blocks(key, digests, spans)


@torch.no_grad()
def _pays(plain: Forward, start: Start, dataset: Dataset) -> bool:
    """Return whether copying the activations of a batch to a GPU takes less time than computing them there."""
    rows = ordered_batches(dataset.lengths, FILL_BATCH)[0]

    def compute(part: np.ndarray) -> Tensor:
        return start.capture(plain, dataset.batch(part, plain.device))

    def copy(values: Tensor) -> Tensor:
        return values.to(plain.device, non_blocking=True)

    with evaluating(plain.graft.model):
        part, values = next(
            iter(in_parts(rows, plain.device, compute, ADVICE))
        )  # the first call takes longer
        computing = _seconds(lambda: compute(part), plain.device)
    host = values.cpu()
    host = host.pin_memory() if plain.device.type == "cuda" else host
    copy(host)
    return _seconds(lambda: copy(host), plain.device) < computing


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    """Return the time that a device takes for some work."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start
