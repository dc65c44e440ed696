"""How likely a language model finds the tokens that are learned, without logits for all the others."""

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
    """(labels, 3) in fp32: the log probability of each label, that of the likeliest other token, and the mean over
    the vocabulary. So the largest number of a row is the first where the model finds the label likeliest.

    rows, places (labels,): where in the batch the logits stand that tell the label; targets (labels,): its id.
    Only there does the output map compute logits. Where these are more than `chunk`, they are computed in parts and,
    for the gradient, once more, so that memory is bounded whatever the vocabulary is.
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
    """What the output layer is given at these places, (labels, width), in a pass that computes few logits.

    None where its logits are not those of the model. That is a matter of the model's code, so the first pass finds it
    out for all others: there the output layer gives made-up logits, which the model hands on as they are or does not.
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


# by model: its output layer, and whether the logits that this one gives are those of the model, not scaled or capped
_known: WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], bool]] = WeakKeyDictionary()


def _gives_logits(model: nn.Module, head: nn.Module) -> bool | None:
    """Whether the model's logits are those of its output layer; None as long as nobody knows."""
    found = _known.get(model)
    return found[1] if found is not None and found[0]() is head else None


@contextmanager
def _choosing(
    head: nn.Module | None, rows: Tensor, places: Tensor, seen: list[Tensor], shown: int | None = None
) -> Iterator[None]:
    """Let the output layer see the states at these places alone, and of them the first `shown`; `seen` gets all."""

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
    """The scores of logits (labels, vocabulary) for targets (labels,)."""
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
