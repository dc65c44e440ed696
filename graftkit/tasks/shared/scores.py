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
from graftkit.tasks.shared.linear_cross_entropy import BEST, LABEL, MEAN, Form, Sizes, linear_cross_entropy

__all__ = ["BEST", "LABEL", "MEAN", "scores_of", "token_scores"]

CHUNK = 1 << 24  # logits that an output layer other than a plain linear one makes at a time: 64 MB of fp32


def token_scores(
    model: Any, inputs: dict[str, Tensor], rows: Tensor, places: Tensor, targets: Tensor,
    chunk: int | None = None, mean: bool = False,
) -> Tensor:  # fmt: skip
    """Return scores (labels, 2) in fp32: the log-probability of each label and that of the most likely token; with `mean`
    (labels, 3), the mean over the vocabulary too. A label is predicted correctly if its score is that of the most likely
    token.

    rows, places (labels,): positions in the batch of the logits that predict each label; targets (labels,): its id.
    The output layer computes logits only there, and `chunk` of them at a time (by default a number for the device), so
    that memory is bounded for any vocabulary size. See `linear_cross_entropy`.
    """
    head = model.get_output_embeddings()
    alone = head is not None and all(
        module.each_row_alone for module in head.modules() if isinstance(module, Added)
    )
    if alone and _form(model, head) is not False:
        found = _states(model, head, inputs, rows, places)
        if found is not None:
            states, form = found
            if _plain(head) and not (mean and form.cap is not None):
                sizes = Sizes.on(states.device)
                sizes = sizes if chunk is None else Sizes(chunk, sizes.rows, chunk)
                return linear_cross_entropy(states, head.weight, targets, head.bias, form, mean, sizes)
            return _in_parts(head, states, targets, form, mean, chunk or CHUNK)
    seen: list[Tensor] = []
    with _choosing(head, rows, places, seen):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return scores_of(logits[0] if seen else logits[rows, places], targets, mean)


def _plain(head: nn.Module) -> bool:
    """Return whether an output layer is its weight and its bias and nothing else."""
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    return type(head) is nn.Linear and not hooks and next(head.children(), None) is None


def _states(
    model: Any, head: nn.Module, inputs: dict[str, Tensor], rows: Tensor, places: Tensor
) -> tuple[Tensor, Form] | None:
    """Return the input of the output layer at these places, (labels, width), from a pass that computes few logits, and the
    form of the model's logits.

    None if the model makes something else of the logits. This depends on the model's code alone, so the first pass decides
    it for all others: it replaces the logits by made-up ones and looks at what the model makes of them.
    """
    seen: list[Tensor] = []
    made: list[Tensor] = []
    known = _form(model, head)

    def make(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        steps = torch.arange(output.shape[-1], device=output.device) % 7 - 3
        made.append(torch.stack([steps / 8, 4096.0 * steps])[None].float())
        return made[0]

    with ExitStack() as stack:
        stack.enter_context(_choosing(head, rows, places, seen, 1 if known else 2))
        if known is None:
            stack.callback(head.register_forward_hook(make).remove)
        logits = model(**inputs, use_cache=False).logits
    if known is None:
        known = _form_of(made[0], logits) if made and logits.shape == made[0].shape else False
        _known[model] = weakref.ref(head), known
    return (seen[0], known) if known else None


def _form_of(given: Tensor, found: Tensor) -> Form | bool:
    """Return the form that turns the first logits into the second; False if none does."""
    small, large = given[0].double().cpu(), found[0].detach().double().cpu()
    place = small[0].argmax()
    scale = float(large[0, place] / small[0, place])
    top = float(large[1].max())
    straight = scale * float(small[1].max())
    forms = [Form(), Form(scale)]
    if 0 < top < straight:
        flat = large[0, place] / top  # tanh(scale * small / cap)
        forms.append(Form(float(torch.atanh(flat) * top / small[0, place]), top))
    exact = 1e-2 if found.dtype in (torch.bfloat16, torch.float16) else 1e-5
    for form in forms:
        if torch.allclose(form(small).double(), large, rtol=exact, atol=0.0):
            return form
    return False


# by model: its output layer, and what the model makes of that layer's logits, if it is known
_known: WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], Form | bool]] = WeakKeyDictionary()


def _form(model: nn.Module, head: nn.Module) -> Any:
    """Return what the model makes of the logits of its output layer, False if no `Form`; None while that is unknown."""
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


def scores_of(logits: Tensor, targets: Tensor, mean: bool = False) -> Tensor:
    """Return the scores of logits (labels, vocabulary) for targets (labels,)."""
    logits = logits.float()
    total = logits.logsumexp(-1)
    label = logits.gather(-1, targets[:, None])[:, 0] - total
    best = (logits.detach().amax(-1) - total).detach()
    return torch.stack([label, best, *([logits.mean(-1) - total] if mean else [])], dim=-1)


def _in_parts(head: Any, states: Tensor, targets: Tensor, form: Form, mean: bool, chunk: int) -> Tensor:
    """Return the scores from an output layer that is called, a part of the rows at a time if there are many."""
    size = max(1, chunk // (int(getattr(head, "out_features", 0)) or chunk))

    def part(some: Tensor, labels: Tensor) -> Tensor:
        return scores_of(form(head(some)), labels, mean)

    if size >= len(targets):
        return part(states, targets)
    pairs = zip(states.split(size), targets.split(size))
    if not torch.is_grad_enabled():
        return torch.cat([part(*pair) for pair in pairs])
    return torch.cat([checkpoint(part, *pair, use_reentrant=False) for pair in pairs])
