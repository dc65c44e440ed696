"""Compute the outcomes of all rows of a dataset, in all processes together."""

from __future__ import annotations

from typing import Any

import torch

from graftkit.data.by_tokens import prediction_batches
from graftkit.engine.memory import in_parts
from graftkit.engine.parallel import gather, processes
from graftkit.tasks.base import Calls, Dataset, Task

ADVICE = "lower data.max_length, or use a device with more memory."


@torch.no_grad()
def predict(
    dataset: Dataset, forward: Calls, task: Task, batch_size: int, tokens: int | None = None
) -> list[Any]:
    """Return the task's outcome for every row, in the dataset's order.

    `tokens`: the tokens of a batch, padding included, instead of `batch_size` rows. Each process computes a share of the batches and receives all outcomes. A batch that does not fit into memory is
    computed in halves.
    """
    forward.graft.model.eval()
    index, world = processes()
    found: list[tuple[int, Any]] = []
    for rows in prediction_batches(dataset.lengths, batch_size, tokens)[index::world]:

        def outcomes(part: Any) -> Any:
            return task.outcomes(forward, dataset.batch(part, forward.device))

        for part, made in in_parts(rows, forward.device, outcomes, ADVICE):
            found += zip(part.tolist(), made)
    result: list[Any] = [None] * len(dataset)
    for row, outcome in (pair for share in gather(found) for pair in share):
        result[row] = outcome
    return result
