"""Outputs of a model on rows whose answers are known: what confidence is fitted on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone.anatomy import is_conv, is_linear
from graftkit.data.source import Batch
from graftkit.errors import UserError, first_line
from graftkit.grafts.graft import Graft
from graftkit.tasks.base import Calls, Dataset, Task

ROWS = 10_000  # at most, of evaluation rows
VALUES = 20_000_000  # at most, of their logits
LABEL, WORDS = "label", "words"  # of `Task.calibrates`

Rows = dict[int, tuple[np.ndarray, np.ndarray, np.ndarray | None]]  # logits, targets and features by row
Recorded = tuple[Rows, str]


@dataclass(frozen=True)
class Evidence:
    """`logits` (n, labels) in fp32; `targets` (n,) label numbers, or (n, labels) of 0 and 1 for sets of labels, empty if the
    rows have none; `features` (n, width): what the last layer reads, None if it reads no vector for a row. n counts
    rows, or words for a task that answers for each. `rows` (n,): the row of the dataset that an answer is to."""

    logits: np.ndarray
    targets: np.ndarray
    features: np.ndarray | None
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def sample_of(dataset: Dataset, labels: int, most: int = ROWS) -> np.ndarray:
    """Return which rows confidence is fitted on, (rows,) bool: all, or a random sample of about `most` answers."""
    most = max(1, min(most, VALUES // max(1, labels)))
    most = max(1, int(most / max(1.0, float(np.mean(dataset.units)))))
    chosen = np.ones(len(dataset), bool)
    if len(dataset) > most:
        chosen[np.random.default_rng(0).permutation(len(dataset))[most:]] = False
    return chosen


def last_layer(graft: Graft) -> nn.Module | None:
    """Return the layer that outputs the logits: the last of the head that the graft trains, or of the model's own."""
    backbone = graft.backbone
    trained = [name for name, group in graft.labels.items() if group.role == "head"]
    if trained:
        found: nn.Module | None = backbone.module(trained[-1].rpartition(".")[0])
    else:
        found = next((site.module for site in reversed(backbone.sites) if site.role == "head"), None)
    return found if found is not None and (is_linear(found) or is_conv(found)) else None


class Recorder:
    """A forward pass that keeps logits, targets and features of some rows of a dataset. `chosen`: (rows,) bool."""

    def __init__(self, forward: Calls, task: Task, chosen: np.ndarray) -> None:
        self.forward, self.chosen = forward, chosen
        self.graft: Graft = forward.graft
        self.device = forward.device
        self.per_word = task.calibrates == WORDS
        self.layer = None if self.per_word or not task.head else last_layer(self.graft)
        self.fault = ""  # why nothing can be fitted on what was kept
        self.rows: Rows = {}

    @property
    def recorded(self) -> Recorded:
        """What this process kept, and what went wrong."""
        return self.rows, self.fault

    def base(self, batch: Batch) -> Tensor:
        return self.forward.base(batch)

    def __call__(self, batch: Batch) -> Tensor:
        if not self.chosen[batch.rows].any():
            return self.forward(batch)
        seen: list[tuple[Any, Any]] = []
        hook = None
        if self.layer is not None:
            hook = self.layer.register_forward_hook(
                lambda _, given, got: seen.append((given[0] if given else None, got))
            )
        try:
            outputs = self.forward(batch)
        finally:
            if hook is not None:
                hook.remove()
        try:
            self._keep(batch, outputs, seen)
        except Exception as error:  # what is only looked at must not stop a run
            self.fault = f"{type(error).__name__}: {first_line(error)}"
        return outputs

    def _keep(self, batch: Batch, outputs: Tensor, seen: list[tuple[Any, Any]]) -> None:
        logits, targets = outputs.float().cpu().numpy(), batch.host_targets
        features = _features(seen, outputs)
        vectors = None if features is None else features.float().cpu().numpy()
        for i, row in enumerate(batch.rows.tolist()):
            if not self.chosen[row]:
                continue
            if self.per_word:
                assert targets is not None
                known = (targets[i] >= 0).numpy()
                self.rows[row] = logits[i][known], targets[i].numpy()[known], None
            else:
                wanted = np.zeros((1, 0)) if targets is None else targets[i : i + 1].numpy()
                self.rows[row] = logits[i : i + 1], wanted, None if vectors is None else vectors[i : i + 1]


def _features(seen: list[tuple[Any, Any]], outputs: Tensor) -> Tensor | None:
    """Return what the last layer read for each row, (rows, width); None if that is not one vector.

    Decoders apply it to every token and keep the outputs of one: it is found by its outputs.
    """
    if len(seen) != 1 or outputs.dim() != 2 or not all(isinstance(value, Tensor) for value in seen[0]):
        return None
    states, made = seen[0]
    if (
        states.dim() == 3
        and made.dim() == 3
        and len(states) == len(outputs)
        and made.shape[2] == outputs.shape[1]
    ):
        place = (made - outputs[:, None].to(made.dtype)).abs().sum(2).argmin(1)
        return states[torch.arange(len(states), device=states.device), place]
    flat = states.flatten(1)
    return flat if len(states) == len(outputs) and flat.shape[1] == states.shape[1] else None


def evidence_of(recorded: Iterable[Recorded]) -> Evidence:
    """Return what several processes recorded, in the order of the rows. Raises `UserError` if nothing was."""
    rows: Rows = {}
    for part, fault in recorded:
        if fault:
            raise UserError(f"the outputs of the model are not those of its labels ({fault}).")
        rows |= part
    numbers = sorted(rows)
    parts = [rows[row] for row in numbers]
    if not sum(len(part[0]) for part in parts):
        raise UserError("none of the rows has an answer that is known.")
    features = [part[2] for part in parts if part[2] is not None]
    return Evidence(
        np.concatenate([part[0] for part in parts]),
        np.concatenate([part[1] for part in parts]),
        np.concatenate(features) if len(features) == len(parts) else None,
        np.repeat(numbers, [len(part[0]) for part in parts]),
    )
