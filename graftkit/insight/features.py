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
WORDS = 300_000  # of a width of 384, half a gigabyte
Read = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class Features:
    """The features of a dataset's rows in its order. `values`: (rows, width) in fp32; for heads that answer for each token
    they are the mean over the tokens of a row. `filled`: what computing them took, and where they came from."""

    values: np.ndarray
    filled: Filled


@dataclass(frozen=True)
class Words:
    """The features of words with a label. `values` (words, width) in fp32; `rows` (words,): of the dataset; `numbers` (words,):
    the place of a word among those of its row; `targets` (words,): indices of labels."""

    values: np.ndarray
    rows: np.ndarray
    numbers: np.ndarray
    targets: np.ndarray


def features_of(forward: Forward, dataset: Dataset, caching: Caching = KEPT) -> Features:
    """Return the features of rows: the input of the head that the graft trains, or of its last layer if it is the model's
    own head, with everything before it in eval mode.

    They come from the cache of the frozen prefix, and go there: later insights, and runs that train the same head on the
    same backbone, find them; those of a model's own head are computed. Raises `UserError` for a graft without a head, and
    if a value is not finite.
    """
    get, filled = _reader(forward, dataset, caching)
    began = time.monotonic()
    with evaluating(forward.graft.model):
        values = _in_parts(dataset, BATCH if filled else FILL_BATCH, get)
    if filled is None:
        filled = Filled(0, len(dataset), time.monotonic() - began, values.nbytes, "memory")
    _refuse_not_finite(values, forward, lambda at: dataset.where(at))
    return Features(values, filled)


def word_features(forward: Forward, dataset: Dataset) -> Words:
    """Return the features of the words that have a label, in the order of the rows. Raises `UserError` as `features_of` does,
    and for more words than fit into memory."""
    count = int(dataset.units.sum())
    if count > WORDS:
        raise UserError(
            f"{dataset.examples.table.source} has {count:,} words with a tag, and at most {WORDS:,} are checked at once; check a "
            "part of its rows."
        )
    get, filled = _reader(forward, dataset, KEPT)
    states, rows, numbers, targets = [], [], [], []
    with evaluating(forward.graft.model):
        for some in ordered_batches(dataset.lengths, BATCH if filled else FILL_BATCH):
            wanted = dataset.targets(some)
            assert wanted is not None
            known = wanted >= 0
            read = get(some).float()
            states.append(read[known[:, : read.shape[1]]].numpy())
            rows.append(some[known.nonzero()[:, 0].numpy()])
            numbers.append((known.cumsum(1) - 1)[known].numpy())
            targets.append(wanted[known].numpy())
    row, number = np.concatenate(rows), np.concatenate(numbers)
    order = np.lexsort((number, row))
    found = Words(np.concatenate(states)[order], row[order], number[order], np.concatenate(targets)[order])
    _refuse_not_finite(found.values, forward, lambda at: dataset.where(int(found.rows[at])))
    return found


def _reader(forward: Forward, dataset: Dataset, caching: Caching) -> tuple[Read, Filled | None]:
    """Return what gives the inputs of the head for rows, on the CPU, and how many were computed; None if each is computed when
    it is asked for, as those of a model's own head are."""
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
        return made.kept.get, made.filled
    module = graft.backbone.module(list(head)[-1].rpartition(".")[0])

    @torch.no_grad()
    def get(rows: np.ndarray) -> Tensor:
        def capture(part: np.ndarray) -> Tensor:
            return captured(module, forward, dataset.batch(part, forward.device))

        return torch.cat([values.cpu() for _, values in in_parts(rows, forward.device, capture, ADVICE)])

    return get, None


def _refuse_not_finite(values: np.ndarray, forward: Forward, where: Callable[[int], str]) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if len(bad):
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        raise UserError(
            f"{where(int(bad[0]))}: {forward.graft.backbone.source} computes features that are not finite for this row{more}; "
            "check the model's weights, or use train.precision=fp32."
        )


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
