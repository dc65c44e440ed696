"""One training step on fake tensors: shapes, types and devices without a number, to count what the real one will take.

The step is the engine's: autocast, checkpointing, joined layers, our own dropout and attention, and the cache of a frozen
prefix all take part. Of the optimizer only what `plan.memory` counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from graftkit.data.source import Batch, Pass, Source
from graftkit.engine.dropout import drawing_from
from graftkit.engine.forward import Forward, evaluating
from graftkit.engine.frozen import Phase, head_of, only_head_trains, set_training
from graftkit.engine.joining import Joining, join
from graftkit.engine.precision import cast
from graftkit.engine.recompute import Recompute
from graftkit.engine.starts import AtBlock, AtHead, AtOwnHead, Start, kept_bytes, trained_alone
from graftkit.grafts.graft import Graft
from graftkit.plan.counting import Counting, Shapes
from graftkit.plan.operations import Operation
from graftkit.tasks.base import Learn


@dataclass(frozen=True)
class Counted:
    """What one pass takes. `peak`: the most bytes alive at once, without weights; `saved`: those between the forward and the
    backward pass, which are activations; `small`, `large`: the peaks of blocks that an allocator keeps, and of those that the
    system maps one by one."""

    peak: int
    saved: int
    operations: Counter[Operation]
    small: int = 0
    large: int = 0

    @property
    def flops(self) -> float:
        return sum(operation.flops * times for operation, times in self.operations.items())

    @property
    def calls(self) -> int:
        return sum(self.operations.values())


class Pretended:
    """A graft whose model, on the meta device, gets fake weights on `device`; passes through it are counted.

    The model cannot be used for anything else afterwards. `cached`: outputs of frozen layers come from a cache, if the
    structure of the model allows it.
    """

    def __init__(
        self, graft: Graft, device: torch.device, precision: str, phase: Phase, learn: Learn, *, checkpointing: str,
        cached: bool, rounded: Any = (), held: bool = False, freed: bool = False, as_on_gpu: bool = False,
    ) -> None:  # fmt: skip
        """`held`: gradients of the batches before are there already; `freed`: each is freed as soon as it is complete.
        `as_on_gpu`: fused attention and torch's own dropout, on a device that stands for a GPU."""
        self.held, self.as_on_gpu = held, as_on_gpu
        self.graft, self.device, self.phase, self.learn = graft, device, phase, learn
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        cast(graft.model, graft.labels, precision, rounded)
        with self.mode:
            fake(graft.model, device)
        self.trained = {name: p for name, p in graft.parameters.items() if name in phase.labels}
        for parameter in graft.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
            if freed:
                parameter.register_post_accumulate_grad_hook(_free)
        self.forward = Forward(graft, device, precision)
        self.start = expected_start(self.forward, phase) if cached else None
        self.checkpointing = checkpointing

    def step(self, source: Source, rows: np.ndarray) -> Counted:
        """Count the forward and backward pass of a batch. Gradients count as they do in a first step."""
        batch = self._batch(source, rows)
        units = source.count(rows, Pass())
        blocks = [self.graft.backbone.module(name) for name in self.graft.backbone.blocks]
        recompute, joining = Recompute(blocks, self.checkpointing), Joining(self.graft.model)
        set_training(self.graft, self.phase.depth, self.phase.labels)
        states = self._states(batch)
        try:
            with self._counted() as counting:
                with torch.no_grad() if self.start is not None and self.start.last else nullcontext():
                    join(joining, source, self.forward, self.phase.depth)
                recompute.enter(self.phase.depth)
                for parameter in self.trained.values() if self.held else ():
                    parameter.grad = torch.zeros_like(parameter)
                counting.operations.clear()
                counting.restart()
                terms = self.learn(_From(self, states), batch)
                total = sum((term.losses.sum() / units[name]) * term.weight for name, term in terms.items())
                saved = counting.now
                del terms
                total.backward()  # type: ignore[union-attr]
                del total
        finally:
            recompute.leave()
            joining.leave()
            for parameter in self.trained.values():
                parameter.grad = None
        return _whole(counting, saved)

    def evaluation(self, source: Source, rows: np.ndarray) -> Counted:
        """Count the forward pass of a batch without gradients, from cached outputs if there are any."""
        batch = self._batch(source, rows)
        states = self._states(batch)
        with torch.no_grad(), evaluating(self.graft.model), self._counted() as counting:
            _From(self, states)(batch)
        return _whole(counting)

    def filling(self, source: Source, rows: np.ndarray) -> Counted:
        """Count the pass of a batch up to the outputs that are cached."""
        batch = self._batch(source, rows)
        assert self.start is not None
        with torch.no_grad(), evaluating(self.graft.model), self._counted() as counting:
            self.start.capture(self.forward, batch)
        return _whole(counting)

    def check_start(self, source: Source, rows: np.ndarray) -> None:
        """Cache nothing if the states of ragged rows do not have one place for each unit of length, as the engine demands."""
        states, lengths = self._states(self._batch(source, rows)), source.lengths
        if states is None or self.start is None or source.uniform or isinstance(lengths, int):
            return
        ragged = states.dim() == 3 and states.shape[1] == int(lengths[rows].max())
        if not (ragged if self.start.per_token else states.dim() == 2):
            self.start = None

    def cached_bytes(self, source: Source, rows: np.ndarray) -> int:
        """Return the bytes of the cached outputs of all rows of a source; `rows`: some, to see their shape."""
        states = self._states(self._batch(source, rows))
        if states is None or self.start is None:
            return 0
        return kept_bytes(self.start, source, states)

    def _batch(self, source: Source, rows: np.ndarray) -> Batch:
        batch = source.batch(rows, self.device, Pass())
        batch.host_inputs  # noqa: B018  (made from numbers, before there are none)
        batch.host_targets  # noqa: B018
        return batch

    def _states(self, batch: Batch) -> Tensor | None:
        """Return what the cache holds for a batch; None if nothing is cached."""
        if self.start is None:
            return None
        with torch.no_grad(), evaluating(self.graft.model), self.mode:
            return self.start.capture(self.forward, batch).detach()

    @contextmanager
    def _counted(self) -> Iterator[Counting]:
        counting = Counting()
        for tensor in (*self.graft.model.parameters(), *self.graft.model.buffers()):
            counting.ignore(tensor)
        own: Any = nullcontext()
        if self.as_on_gpu:
            own = _fused_attention()
        elif self.device.type == "cpu":
            own = drawing_from(Shapes(counting))
        with self.mode, own, counting:
            yield counting


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Leave dropout out of attention, which GPUs compute within the fused kernel."""
    plain = F.scaled_dot_product_attention

    def fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **more: Any
    ) -> Tensor:
        return plain(query, key, value, attn_mask=attn_mask, **more)

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _whole(counting: Counting, saved: int = 0) -> Counted:
    return Counted(counting.peak, saved, counting.operations, counting.small_peak, counting.large_peak)


def _free(parameter: Tensor) -> None:
    parameter.grad = None


class _From(Forward):
    """The forward pass of a pretended step, from cached states if there are any."""

    def __init__(self, pretended: Pretended, states: Tensor | None) -> None:
        plain = pretended.forward
        super().__init__(plain.graft, plain.device, plain.precision)
        self.plain, self.start, self.states = plain, pretended.start, states

    def __call__(self, batch: Batch) -> Tensor:
        if self.states is None or self.start is None:
            return self.plain(batch)
        return self.start.resume(self.plain, batch, self.states)


def expected_start(plain: Forward, phase: Phase) -> Start | None:
    """Return where passes will start from cached outputs, from the structure of the model alone.

    The engine tests on two rows whether a start gives the same logits, which takes numbers; where it finds that it does not,
    nothing is cached and a step takes more than is counted here.
    """
    graft = plain.graft
    if only_head_trains(graft, phase.labels):
        head = head_of(graft)
        assert head is not None
        return AtHead(head)
    blocks = [graft.backbone.module(name) for name in graft.backbone.blocks]
    depth = min(phase.depth, len(blocks) - 1)
    found = trained_alone(graft, phase.labels)
    if found is not None and phase.depth == len(blocks) and not _drops(graft.model, found[1]):
        return AtOwnHead(found[1], torch.Size([-1]), found[0])
    return AtBlock(blocks, depth) if depth > 0 else None


def _drops(model: nn.Module, but: nn.Module) -> bool:
    """Return whether dropout may act behind the blocks, outside of a module."""
    inside = set(but.modules())
    return any(isinstance(m, nn.Dropout) and m.p and m.training for m in model.modules() if m not in inside)


def fake(model: nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers by fake ones of the same shapes and types on a device; call it in a fake mode."""
    made: dict[int, Any] = {}

    def of(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = made.setdefault(id(parameter), None)
                if new is None:
                    new = made[id(parameter)] = nn.Parameter(of(parameter), requires_grad=False)
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                new = made.get(id(buffer))
                module._buffers[name] = made[id(buffer)] = of(buffer) if new is None else new
