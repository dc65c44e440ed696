"""The features of rows: what a backbone, with its graft, hands to its head."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftkit.data.order import ordered_batches
from graftkit.engine.cached import CachedForward, Caching, make_forward
from graftkit.engine.filling import ADVICE, FILL_BATCH, Filled
from graftkit.engine.forward import Forward, evaluating
from graftkit.engine.memory import in_parts
from graftkit.engine.starts import captured
from graftkit.errors import UserError
from graftkit.tasks.base import Dataset

PASSES = 2  # features are read several times, so they are kept
BATCH = 256
KEPT = Caching(later=True)


@dataclass(frozen=True)
class Features:
    """The features of a dataset's rows in its order. `values`: (rows, width) in fp32; for heads that answer for each token
    they are the mean over the tokens of a row. `filled`: what computing them took, and where they came from."""

    values: np.ndarray
    filled: Filled


def features_of(forward: Forward, dataset: Dataset, caching: Caching = KEPT) -> Features:
    """Return the features of rows: the input of the head that the graft trains, or of its last layer if it is the model's
    own head, with everything before it in eval mode.

    They come from the cache of the frozen prefix, and go there: later insights, and runs that train the same head on the
    same backbone, find them; those of a model's own head are computed. Raises `UserError` for a graft without a head, and
    if a value is not finite.
    """
    graft = forward.graft
    head = {name: group for name, group in graft.labels.items() if group.role == "head"}
    if not head:
        raise UserError(
            f"{graft.method} trains no head on {graft.backbone.source}, so there are no features that a head reads; this "
            "needs a task with a head, such as classify, and a method with one, such as head()."
        )
    depth = len(graft.backbone.blocks)
    made = make_forward(graft, forward.device, forward.precision, depth, dataset, PASSES, head, caching)
    if isinstance(made, CachedForward) and made.start.last:
        assert made.filled is not None
        values, filled = _in_parts(dataset, BATCH, made.kept.get), made.filled
    else:
        values, filled = _of_own_head(forward, dataset, list(head)[-1].rpartition(".")[0])
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if len(bad):
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        raise UserError(
            f"{dataset.where(int(bad[0]))}: {graft.backbone.source} computes features that are not finite for this row{more}; "
            "check the model's weights, or use train.precision=fp32."
        )
    return Features(values, filled)


@torch.no_grad()
def _of_own_head(forward: Forward, dataset: Dataset, layer: str) -> tuple[np.ndarray, Filled]:
    """Return the input of the last layer of the model's own head."""
    module = forward.graft.backbone.module(layer)
    began = time.monotonic()

    def get(rows: np.ndarray) -> Tensor:
        def capture(part: np.ndarray) -> Tensor:
            return captured(module, forward, dataset.batch(part, forward.device))

        return torch.cat([values.cpu() for _, values in in_parts(rows, forward.device, capture, ADVICE)])

    with evaluating(forward.graft.model):
        values = _in_parts(dataset, FILL_BATCH, get)
    return values, Filled(0, len(dataset), time.monotonic() - began, values.nbytes, "memory")


def _in_parts(dataset: Dataset, size: int, get: Callable[[np.ndarray], Tensor]) -> np.ndarray:
    """Return one vector per row, (rows, width): the mean over tokens, or over the places of a feature map.

    Rows of like length are computed together."""
    found: np.ndarray | None = None
    for rows in ordered_batches(dataset.lengths, size):
        states = get(rows).float()
        if states.dim() == 3 and not dataset.uniform:  # (rows, tokens, width)
            inside = torch.arange(states.shape[1]) < torch.from_numpy(dataset.lengths[rows])[:, None]
            states = (states * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
        elif states.dim() == 3:
            states = states.mean(1)
        elif states.dim() > 3:  # (rows, channels, height, width)
            states = states.flatten(2).mean(2)
        if found is None:
            found = np.empty((len(dataset), states.shape[1]), np.float32)
        found[rows] = states.numpy()
    assert found is not None
    return found
