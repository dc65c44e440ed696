"""Log-probabilities of target tokens under a language model, without computing logits at other positions."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftkit.backbone.anatomy import Added

CHUNK = 1 << 24  # logits that are held at a time: 64 MB of fp32
LABEL, OTHER, MEAN = range(3)  # columns of the scores


def token_scores(
    model: Any, inputs: dict[str, Tensor], rows: Tensor, places: Tensor, targets: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Return scores (labels, 3) in fp32: the log-probability of each label, that of the most likely other token, and the
    mean over the vocabulary. A label is predicted correctly if its own score is at least that of the other token.

    rows, places (labels,): positions in the batch of the logits that predict each label; targets (labels,): its id.
    The output layer computes logits only there. If there are more than `chunk` logits, they are computed in chunks and
    recomputed for the gradient, so that memory is bounded for any vocabulary size.
    """
    head = model.get_output_embeddings()
    vocabulary = int(getattr(head, "out_features", 0))
    size = max(1, chunk // vocabulary) if vocabulary else len(targets)
    alone = head is not None and all(
        module.each_row_alone for module in head.modules() if isinstance(module, Added)
    )
    if alone and size < len(targets) and _gives_logits(model, head) is not False:
        states = _states(model, head, inputs, rows, places)
        if states is not None:
            return _in_parts(head, states, targets, size)
    seen: list[Tensor] = []
    with _choosing(head, rows, places, seen):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return scores_of(logits[0] if seen else logits[rows, places], targets)


def _states(
    model: Any, head: nn.Module, inputs: dict[str, Tensor], rows: Tensor, places: Tensor
) -> Tensor | None:
    """Return the input of the output layer at these places, (labels, width), from a pass that computes few logits.

    None if the output layer's logits are not those of the model. This depends on the model's code alone, so the first
    pass decides it for all others: it replaces the logits by made-up ones and checks that the model returns them unchanged.
    """
    seen: list[Tensor] = []
    made: list[Tensor] = []
    known = _gives_logits(model, head)

    def make(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        steps = torch.arange(output.shape[-1], device=output.device) % 7 - 3
        made.append(torch.stack([0 * steps, 256 * steps]).to(output.dtype)[None])  # whole numbers in any type
        return made[0]

    with ExitStack() as stack:
        stack.enter_context(_choosing(head, rows, places, seen, 1 if known else 2))
        if known is None:
            stack.callback(head.register_forward_hook(make).remove)
        logits = model(**inputs, use_cache=False).logits
    if known is None:
        known = bool(made) and torch.equal(logits.float(), made[0].float())
        _known[model] = weakref.ref(head), known
    return seen[0] if known else None


# by model: its output layer, and whether the model returns that layer's logits unchanged, neither scaled nor capped
_known: WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], bool]] = WeakKeyDictionary()


def _gives_logits(model: nn.Module, head: nn.Module) -> bool | None:
    """Return whether the model's logits are those of its output layer; None while that is unknown."""
    found = _known.get(model)
    return found[1] if found is not None and found[0]() is head else None


@contextmanager
def _choosing(
    head: nn.Module | None, rows: Tensor, places: Tensor, seen: list[Tensor], shown: int | None = None
) -> Iterator[None]:
    """Pass only the first `shown` states at these places to the output layer; append all of them to `seen`."""

    def choose(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states: Tensor = args[0] if args else next(iter(kwargs.values()))
        seen.append(states[rows, places])
        chosen = seen[-1][:shown][None]
        return ((chosen, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): chosen})

    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(choose, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def scores_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the scores of logits (labels, vocabulary) for targets (labels,)."""
    logits = logits.float()
    total = logits.logsumexp(-1)
    label = logits.gather(-1, targets[:, None])[:, 0] - total
    with torch.no_grad():
        other = logits.scatter(-1, targets[:, None], -torch.inf).amax(-1) - total
    return torch.stack([label, other, logits.mean(-1) - total], dim=-1)


def _in_parts(head: Any, states: Tensor, targets: Tensor, size: int) -> Tensor:
    def part(some: Tensor, labels: Tensor) -> Tensor:
        return scores_of(head(some), labels)

    pairs = zip(states.split(size), targets.split(size))
    if not torch.is_grad_enabled():
        return torch.cat([part(*pair) for pair in pairs])
    return torch.cat([checkpoint(part, *pair, use_reentrant=False) for pair in pairs])
