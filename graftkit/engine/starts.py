"""Find where in a network a forward pass may start, because all inputs to that point are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd as _Dropout

from graftkit.backbone.walk import buffers_of, modules_of, parameters_of
from graftkit.data.source import Batch, Source
from graftkit.engine.forward import Forward, evaluating
from graftkit.engine.frozen import head_of, only_head_trains, set_training
from graftkit.engine.precision import autocast
from graftkit.grafts.graft import Graft
from graftkit.methods.base import OutputHead
from graftkit.optim.labels import Labels
from graftkit.tasks.base import Dataset

SAME = 1e-3  # largest relative difference of logits that padding and bf16 may cause


class Start(Protocol):
    """A point in the network whose input is entirely frozen. `per_token`: that input is one state per token.
    `reads_inputs`: resuming from there needs the inputs of the batch, such as its mask. `place`: a name of the point, the
    same in all models of one architecture. `end`: the module that a pass starts at; `last`: nothing of the model comes
    after it."""

    per_token: bool
    reads_inputs: bool
    last: bool

    @property
    def place(self) -> str: ...

    @property
    def end(self) -> nn.Module: ...

    def capture(self, plain: Forward, batch: Batch) -> Tensor:
        """Return the input at this point."""
        ...

    def resume(self, plain: Forward, batch: Batch, states: Tensor) -> Tensor:
        """Return the logits, computed from the cached states."""
        ...


class AtHead:
    """Start at a head of GraftKit: from pooled features (rows, width), or token states."""

    reads_inputs = False
    last = True

    def __init__(self, head: OutputHead) -> None:
        self.head = self.end = head
        self.per_token = head.per_token

    @property
    def place(self) -> str:
        return f"{type(self.head).__qualname__} {self.head.reads}"

    def capture(self, plain: Forward, batch: Batch) -> Tensor:
        got: list[Tensor] = []
        with _grabbing(self.head, got):
            plain(batch)
        return got[0]

    def resume(self, plain: Forward, batch: Batch, states: Tensor) -> Tensor:
        return self.head.logits(states)


class AtBlock:
    """Start at block `depth`: from states (rows, length, width), or feature maps."""

    per_token = reads_inputs = True
    last = False

    def __init__(self, blocks: list[nn.Module], depth: int) -> None:
        self.blocks, self.depth = blocks, depth
        self.end = blocks[depth]

    @property
    def place(self) -> str:
        return f"block {self.depth}"

    def capture(self, plain: Forward, batch: Batch) -> Tensor:
        return captured(self.blocks[self.depth], plain, batch)

    def resume(self, plain: Forward, batch: Batch, states: Tensor) -> Tensor:
        with _skipping(self.blocks, self.depth, states):
            return plain(batch)


class AtOwnHead:
    """Start at the model's own last layers, which output the logits, each row of `shape`."""

    per_token = reads_inputs = False
    last = True

    def __init__(self, module: nn.Module, shape: torch.Size, name: str) -> None:
        self.module, self.shape, self.end = module, shape, module
        self.place = f"input of {name}"

    def capture(self, plain: Forward, batch: Batch) -> Tensor:
        return captured(self.module, plain, batch)

    def resume(self, plain: Forward, batch: Batch, states: Tensor) -> Tensor:
        with autocast(plain.device, plain.precision):
            return self.module(states).reshape(len(states), *self.shape)


def find_start(plain: Forward, depth: int, dataset: Dataset, labels: Labels) -> tuple[Start, int] | None:
    """Return the last point where a pass over these rows may start while `labels` are trained, and the number of values
    to cache for all rows; None if there is no such point. `depth`: of the frozen prefix, in blocks.
    """
    if only_head_trains(plain.graft, labels):
        head = head_of(plain.graft)
        assert head is not None
        return AtHead(head), head.width * (int(dataset.lengths.sum()) if head.per_token else len(dataset))
    blocks = min(depth, len(plain.graft.backbone.blocks) - 1)  # what follows the last block is recomputed
    own = _own_head(plain, depth, dataset, labels)
    return own or (_passed_on(plain, blocks, dataset) if blocks > 0 else None)


def _own_head(plain: Forward, depth: int, dataset: Dataset, labels: Labels) -> tuple[AtOwnHead, int] | None:
    """Return the model's own last layers and the number of values to cache, if only they are trained and they compute the
    logits; otherwise None.

    This is tested on the longest and the shortest row: the layers are called once, with one tensor, and compute the
    logits from it alone; and in training this tensor is the same, so nothing random happens before them.
    """
    graft, model = plain.graft, plain.graft.model
    found = trained_alone(graft, labels)
    if found is None:
        return None
    name, module = found
    batch = _extremes(plain, dataset)
    entered: list[tuple] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: entered.append((*map(_copied, args), *kwargs.values())), with_kwargs=True
    )
    try:
        with evaluating(model), torch.no_grad():
            wanted: Any = plain(batch)
    finally:
        handle.remove()
    if len(entered) != 1 or len(entered[0]) != 1 or not isinstance(entered[0][0], Tensor):
        return None
    states = entered[0][0]
    if len(states) != len(batch.rows) or not (dataset.uniform or states.dim() == 2):
        return None
    start = AtOwnHead(module, wanted.shape[1:], name)
    with evaluating(model), torch.no_grad():
        with autocast(plain.device, plain.precision):
            got = module(states.clone())
        if not isinstance(got, Tensor) or got.numel() != wanted.numel():
            return None
        if not _alike(got.reshape(wanted.shape), wanted):
            return None
        with _as_it_was(model, plain.device):
            set_training(graft, depth, labels)
            inside = set(modules_of(module).values())
            if any(
                isinstance(m, _Dropout) and m.p and m.training
                for m in modules_of(model).values()
                if m not in inside
            ):
                return None
            if not _alike(start.capture(plain, batch), states):
                return None
    return start, states[0].numel() * len(dataset)


def trained_alone(graft: Graft, labels: Labels) -> tuple[str, nn.Module] | None:
    """Return the largest part of the model whose parameters are exactly the trained ones, with its name."""
    trained = {id(parameter) for name, parameter in graft.parameters.items() if name in labels}
    parts = ((name, module) for name, module in modules_of(graft.model).items() if name)
    return next((part for part in parts if {id(p) for p in parameters_of(part[1]).values()} == trained), None)


def _extremes(plain: Forward, dataset: Dataset) -> Batch:
    """Return a batch of the longest and the shortest row."""
    return dataset.batch(np.unique([dataset.lengths.argmax(), dataset.lengths.argmin()]), plain.device)


def _without_padding(outputs: Tensor, batch: Batch, dataset: Dataset) -> Tensor:
    """Zero per-token outputs in the padding, which no loss reads; return other outputs unchanged."""
    longest = int(dataset.lengths[batch.rows].max())
    if dataset.uniform or outputs.dim() < 2 or outputs.shape[:2] != (len(batch.rows), longest):
        return outputs
    outputs = outputs.clone()
    for i, row in enumerate(batch.rows):
        outputs[i, dataset.lengths[row] :] = 0
    return outputs


def _alike(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= SAME * wanted.abs().max())


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _passed_on(plain: Forward, depth: int, dataset: Dataset) -> tuple[AtBlock, int] | None:
    """Return block `depth` and the number of values to cache, if the blocks before it serve only to compute its input;
    otherwise None.

    This is tested on the longest and the shortest row: nothing before the block is trained, each earlier block is
    called once and returns only its states, which are the next block's input, and skipping them gives the same result.
    That fails if a decoder attends to all of an encoder, or if something lies between the blocks.
    """
    lengths, batch = dataset.lengths, _extremes(plain, dataset)
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
        with evaluating(plain.graft.model):
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
    start = AtBlock(blocks, depth)
    with evaluating(plain.graft.model), torch.no_grad():
        got = start.resume(plain, batch, states)
        if not _alike(_without_padding(got, batch, dataset), _without_padding(wanted, batch, dataset)):
            return None
    size = states[0].numel() * len(dataset) if dataset.uniform else int(lengths.sum()) * states.shape[2]
    return start, size


def _entering(args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return the states passed to a block, as first argument or by their usual name."""
    return args[0] if args else kwargs.get("hidden_states")


def captured(module: nn.Module, plain: Forward, batch: Batch) -> Tensor:
    """Return the input of a module, and stop the forward pass there."""
    got: list[Tensor] = []
    handle = module.register_forward_pre_hook(_stop_with(got), with_kwargs=True)
    try:
        plain(batch)
    except _Captured:
        pass
    finally:
        handle.remove()
    return got[0]


def kept_bytes(start: Start, source: Source, states: Tensor) -> int:
    """Return the bytes of the cached values of all rows of a source; `states`: those of some of them."""
    lengths = source.lengths
    if start.per_token and not source.uniform and not isinstance(lengths, int):
        return int(lengths.sum()) * states[0, 0].numel() * states.element_size() * source.views
    return len(source) * states[0].numel() * states.element_size() * source.views


@contextmanager
def _as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """On exit the model's buffers, such as running statistics, and the random state are restored."""
    before = [(buffer, buffer.clone()) for buffer in buffers_of(model).values()]
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


class _Captured(Exception):
    pass


def _stop_with(got: list[Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        got.append(_entering(args, kwargs))
        raise _Captured

    return hook


@contextmanager
def _grabbing(head: OutputHead, got: list[Tensor]) -> Iterator[None]:
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
    """Make blocks before `depth` return their input, and block `depth` start from `states`."""

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
