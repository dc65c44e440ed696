"""Activation checkpointing: the trained blocks keep their input and compute the rest again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". The gradients are the same, bit for bit on a CPU: random
numbers are drawn again from the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from graftkit.backbone import packed
from graftkit.engine import dropout
from graftkit.engine.fused_blocks import FusedBlock
from graftkit.errors import UserError
from graftkit.libraries import cache_names

FROM_THE_START = ("blocks", "selective", "offload")
# results that 'selective' keeps: those of products and of attention; all between them is computed again
KEPT = (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_flex_attention",
)  # fmt: skip


class Recompute:
    """Computes blocks again in the backward pass while it is `on`.

    `how`: 'none'; 'blocks', which keeps the input of each block; 'selective', which also keeps the results of products and
    attention; 'offload', which keeps the input of each block in pinned host memory; 'auto': 'none' until `turn_on`, then 'blocks'.
    """

    def __init__(self, blocks: Sequence[nn.Module], how: str) -> None:
        self.blocks, self.how = blocks, how
        self.on = how in FROM_THE_START
        self.depth: int | None = None  # of the current phase
        self.changed: dict[
            nn.Module, Callable | None
        ] = {}  # and a forward that the block had been given before
        self.untold = False

    def enter(self, depth: int) -> None:
        """Begin a phase in which the first `depth` blocks are frozen. They have no gradient, and keep nothing."""
        self.leave()
        self.depth = depth
        for block in self.blocks[depth:] if self.on else ():
            before = vars(block).get("forward")
            if before is None or isinstance(before, FusedBlock):
                self.changed[block] = before
                block.forward = self._again(block.forward)  # type: ignore[method-assign]

    def leave(self) -> None:
        """Leave the model as it was."""
        for block, before in self.changed.items():
            if before is None:
                del block.forward
            else:
                block.forward = before  # type: ignore[method-assign]
        self.changed = {}

    def turn_on(self) -> bool:
        """Begin to recompute because memory ran out; return whether that may help. Compiled blocks stay as they are."""
        if self.on or self.how != "auto" or self.depth is None or not self.blocks[self.depth :]:
            return False
        self.on = True
        self.enter(self.depth)
        self.untold = bool(self.changed)
        return self.untold

    def notes(self) -> Iterator[str]:
        """Yield what a user is to be told, once."""
        if self.untold:
            self.untold = False
            yield "note: memory ran out, so activations are recomputed from here on (train.checkpointing=blocks)"

    def _again(self, forward: Callable) -> Callable:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or _holds_cache(args, kwargs):
                return forward(*args, **kwargs)
            with self._keeping(args):
                return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

        return run

    def _keeping(self, args: tuple) -> AbstractContextManager:
        """Return a context that decides where `checkpoint` keeps the input of a block; what is inside it has hooks of its own."""
        states = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
        return nullcontext() if self.how != "offload" or states is None else OnHost(states)

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return what surrounds the forward pass of a block, and what surrounds it when it is computed again."""
        again = _both(_as_then(), packed.packed(packed.current()))
        if self.how != "selective":
            return ExitStack(), again
        first, second = create_selective_checkpoint_contexts(_policy)
        return first, _both(again, second)


class OnHost(save_on_cpu):
    """Keeps `states` in pinned host memory instead of the graph. Other tensors, such as masks, are shared by all blocks and stay."""

    def __init__(self, states: Tensor) -> None:
        super().__init__(pin_memory=True)
        pack, unpack, address = self.pack_hook, self.unpack_hook, states.data_ptr()
        self.pack_hook = lambda tensor: pack(tensor) if tensor.data_ptr() == address else tensor
        self.unpack_hook = lambda kept: unpack(kept) if isinstance(kept, tuple) else kept


def check_offload(how: str, device: torch.device) -> None:
    """Raise `UserError` for 'offload' where activations are in host memory anyway."""
    if how == "offload" and device.type == "cpu":
        raise UserError(
            "train.checkpointing=offload moves activations from a GPU to the host, but this run computes on the CPU; use "
            "train.checkpointing=blocks."
        )


@contextmanager
def _both(one: AbstractContextManager, other: AbstractContextManager) -> Iterator[None]:
    with one, other:
        yield


def _as_then() -> AbstractContextManager:
    """Return a context in which our own dropout draws what it draws from now on."""
    source = dropout.current()
    return ExitStack() if source is None else source.again()


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().removeprefix("aten::").partition(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _holds_cache(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether a block got a cache of keys and values, which a second pass would extend again."""
    from transformers.cache_utils import Cache

    given = {name: kwargs[name] for name in cache_names() if kwargs.get(name) is not None}
    return bool(given) or any(isinstance(value, Cache) for value in args)
