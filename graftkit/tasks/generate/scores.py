"""How likely a language model finds the tokens that are learned, without logits for all the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
    seen: list[Tensor] = []
    large = False

    def gather(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states: Tensor = args[0] if args else next(iter(kwargs.values()))
        chosen = states[rows, places]
        seen.append(chosen)
        shown = (chosen[:1] if large else chosen)[None]
        return ((shown, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): shown})

    def run() -> Tensor:
        seen.clear()
        handle = (
            None if head is None else head.register_forward_pre_hook(gather, with_kwargs=True, prepend=True)
        )
        try:
            logits: Tensor = model(**inputs, use_cache=False).logits
        finally:
            if handle is not None:
                handle.remove()
        return logits[0] if seen else logits[rows, places]

    vocabulary = int(getattr(head, "out_features", 0))
    alone = head is not None and not any(isinstance(module, Added) for module in head.modules())
    large = alone and len(targets) > 1 and len(targets) * vocabulary > chunk
    logits = run()
    if large and seen:
        states = seen[0]
        if _same(head(states[:1]), logits):
            return _in_parts(head, states, targets, max(1, chunk // vocabulary))
        large = False  # the model does more with the output map's logits than the map: scales, caps or shifts them
        logits = run()
    return scores_of(logits, targets)


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


def _same(left: Tensor, right: Tensor) -> bool:
    limit = 2e-2 if left.dtype == torch.bfloat16 else 1e-4
    left, right = left.detach().float(), right.detach().float()
    return bool((left - right).abs().max() <= limit * left.abs().max())
