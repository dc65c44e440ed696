"""Scores of chosen tokens from a model of a body and a head, where the whole head runs on the chosen tokens alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.tasks.shared.scores import token_scores


def scores_of_chosen(
    model: Any, inputs: dict[str, Tensor], rows: Tensor, places: Tensor, targets: Tensor
) -> Tensor:
    """Return `token_scores` (targets, 2) of a masked language model of transformers.

    Between the body, such as `model.bert`, and the head, only the states at these places are kept, as one row, so that the
    head's own layers are computed for those alone.
    """
    body = getattr(model, "base_model", None)
    if body is None or body is model:
        return token_scores(model, inputs, rows, places, targets)
    with chosen_states(body, rows, places):
        return token_scores(
            model, inputs, torch.zeros_like(rows), torch.arange(len(places), device=places.device), targets
        )


@contextmanager
def chosen_states(body: nn.Module, rows: Tensor, places: Tensor) -> Iterator[None]:
    """Make a body return its last states at these places only, (1, places, width)."""

    def choose(module: nn.Module, args: Any, output: Any) -> Any:
        chosen = output[0][rows, places][None]
        if isinstance(output, tuple):
            return (chosen, *output[1:])
        output["last_hidden_state"] = chosen
        return output

    handle = body.register_forward_hook(choose)
    try:
        yield
    finally:
        handle.remove()
