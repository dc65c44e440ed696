"""What an explanation of an answer asks of a task: which value to explain, and the parts of the input that it may come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftkit.errors import UserError, listing, nearest

if TYPE_CHECKING:
    from graftkit.backbone import Backbone
    from graftkit.tasks.base import Dataset

CELLS = 14  # of an image at most, on each side
CELL = 4  # pixels of its side, at least
PATCHES = 32  # of a model on each side, above which they are too many to look at
SLICES = 20  # of a sound at most


@dataclass(frozen=True)
class Aim:
    """The value that is explained: an entry of what `graded` makes of the outputs of one row of a dataset.

    `said`: what it is called, such as its `label`. `odds`: it is the log-odds of an answer; else a number of its own.
    """

    row: int
    at: tuple[int, ...]
    said: dict[str, Any]
    odds: bool = True


@dataclass(frozen=True)
class Cut:
    """The parts of one row's input that an explanation scores.

    `parts`: what is said of each. `owners`: the number of the part that each place of the input belongs to, -1 for none;
    int64, of a shape that broadcasts to the values of the row. `name`: the model's argument with these values; None if
    they are the embeddings of its token ids. `absent`: the values of a row in which no part is there, unless they are
    token embeddings.
    """

    parts: list[dict[str, Any]]
    owners: np.ndarray
    name: str | None = None
    absent: Tensor | None = None


class Explained:
    """How the answers of a task are explained; for tasks that leave `explains` at False they are not."""

    explains: ClassVar[bool] = False
    per_word: ClassVar[bool] = False  # there is an answer for each word, of which one is chosen

    def graded(self, outputs: Tensor) -> Tensor:
        """Return what an explanation is of, (rows, ...), given outputs in fp32: the log-odds of each label,
        log p - log(1 - p), whose differences do not vanish where probabilities are close to 0 or 1; or numbers in the
        units of the answers. Differentiable."""
        raise NotImplementedError

    def aim(
        self, dataset: Dataset, outputs: Callable[[int], Tensor], labels: Sequence[str], label: str | None,
        word: str | None,
    ) -> Aim:  # fmt: skip
        """Return what to explain of the one example of a dataset: its answer, or another `label`. `outputs`: returns the
        outputs (1, ...) of a row in fp32; `word`: chooses an answer, if there is one for each word."""
        index = self.chosen(self.graded(outputs(0))[0]) if label is None else index_of(label, labels)
        return Aim(0, (index,), {"label": labels[index]})

    def chosen(self, grades: Tensor) -> int:
        """Return the index of the label that is the answer, given the log-odds (labels,) of a row."""
        return int(grades.argmax())

    def divide(self, dataset: Dataset, row: int, backbone: Backbone, inputs: dict[str, Tensor]) -> Cut:
        """Divide the input of a row into parts. `inputs`: those of the model for this row alone, each (1, ...)."""
        raise NotImplementedError

    def pictured(self, dataset: Dataset, row: int, inputs: dict[str, Tensor]) -> np.ndarray | None:
        """Return what the parts of a row are shown on, (height, width, 3) of 8 bits: an image as the model reads it, or the
        spectrogram of a sound; None for texts."""
        return None


def index_of(label: str, labels: Sequence[str]) -> int:
    """Return the index of a label. Raises `UserError` for an unknown one."""
    if label not in labels:
        raise UserError(
            f"label {label!r} is not among the {len(labels)} labels of this run ({listing(labels, 8)})."
            f"{nearest(label, labels)}"
        )
    return list(labels).index(label)


def log_odds(log_probs: Tensor) -> Tensor:
    """Return log p - log(1 - p) for log-probabilities of labels along the last axis.

    For the likeliest label 1 - p is the sum over the others, as the difference is rounded to 0 where p is close to 1.
    """
    is_top = torch.zeros_like(log_probs, dtype=torch.bool).scatter(
        -1, log_probs.argmax(-1, keepdim=True), True
    )
    above = log_probs.masked_fill(is_top, -torch.inf).logsumexp(-1, keepdim=True)
    below = torch.log1p(-log_probs.masked_fill(is_top, -1.0).exp())
    return log_probs - torch.where(is_top, above, below)


def grid(pixels: Tensor, patch: int | None, name: str) -> Cut:
    """Divide an image (1, channels, height, width) into cells: the patches of a model that has some, else at most 14 on a
    side. Without a cell its pixels have the image's mean colour."""
    height, width = pixels.shape[-2:]
    if patch is not None and max(height, width) // patch > PATCHES:
        patch = None
    rows, columns = (max(1, side // patch if patch else min(CELLS, side // CELL)) for side in (height, width))
    top, left = (np.arange(side) * count // side for side, count in ((height, rows), (width, columns)))
    edges = [
        [int(np.searchsorted(places, i)) for i in range(count + 1)]
        for places, count in ((top, rows), (left, columns))
    ]
    parts = [
        {"box": [edges[1][x], edges[0][y], edges[1][x + 1], edges[0][y + 1]]} for y in range(rows) for x in range(columns)
    ]  # fmt: skip
    absent = pixels.mean((-2, -1), keepdim=True).expand_as(pixels)
    return Cut(parts, top[:, None] * columns + left, name, absent)


def slices(values: Tensor, axis: int, frames: int, seconds: float, name: str) -> Cut:
    """Divide a sound into at most 20 slices of time. `axis`: of time in a row of `values` (1, ...); `frames`: how many of
    its places are not padding, `seconds` long. Without a slice its samples are 0, or its features their mean over time."""
    count = min(SLICES, frames)
    owners = np.full(values.shape[1 + axis], -1, np.int64)
    owners[:frames] = np.arange(frames) * count // frames
    edges = np.searchsorted(owners[:frames], np.arange(count + 1)) * seconds / frames
    parts = [{"start": round(float(a), 4), "end": round(float(b), 4)} for a, b in pairwise(edges)]
    waves = values.dim() == 2
    heard = values.narrow(1 + axis, 0, frames)
    absent = values.clone()
    silence = torch.zeros_like(heard) if waves else heard.mean(1 + axis, keepdim=True).expand_as(heard)
    absent.narrow(1 + axis, 0, frames).copy_(silence)
    return Cut(parts, owners.reshape([-1 if i == axis else 1 for i in range(values.dim() - 1)]), name, absent)
