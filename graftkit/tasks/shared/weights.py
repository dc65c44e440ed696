"""Class weights of a loss: 'balanced', or a number for each label named in the recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.errors import UserError, listing, nearest
from graftkit.tasks.shared.labels import LabelIndex, label_text

BALANCED = "balanced"


def check_class_weights(given: str | Mapping[Any, Any] | None, labels: Sequence[str], task: str) -> None:
    """Raise `UserError` for a label that is not in the training rows, or a weight that is not a positive number."""
    if not isinstance(given, Mapping):
        return
    index, seen = LabelIndex(labels), set()
    for key, weight in given.items():
        name = label_text(key)
        if index.find(name) is None:
            raise UserError(
                f"{task}(): class_weights names {name!r}, which is not one of the {len(labels)} labels of the training rows "
                f"({listing(labels, 8)}).{nearest(name, labels)}"
            )
        if index.find(name) in seen:
            raise UserError(f"{task}(): class_weights names {name!r} twice.")
        seen.add(index.find(name))
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise UserError(
                f"{task}(): class_weights gives {name!r} the weight {weight!r}; it must be a number above 0."
            )


def named_weights(given: Mapping[Any, Any], labels: Sequence[str]) -> Tensor:
    """Return the weights (labels,) in float32, 1 for labels that are not named."""
    index, weights = LabelIndex(labels), torch.ones(len(labels))
    for key, weight in given.items():
        place = index.find(label_text(key))
        if place is not None:
            weights[place] = float(weight)
    return weights


def class_weights(
    given: str | Mapping[Any, Any] | None, counts: np.ndarray, labels: Sequence[str]
) -> Tensor | None:
    """Return the weight of each class (labels,), with mean 1 over the training rows; None if all are equal.

    `counts` (labels,): rows of each label. 'balanced' is rows / (classes that occur * rows of the class), as in
    scikit-learn. The mean of the weighted losses over all rows equals `torch.nn.CrossEntropyLoss(weight=...)`.
    """
    if given is None:
        return None
    rows = torch.as_tensor(counts, dtype=torch.float32)
    if isinstance(given, Mapping):
        weights = named_weights(given, labels)
        return weights * (rows.sum() / (weights * rows).sum().clamp(min=1e-12))
    return rows.sum() / ((rows > 0).sum().clamp(min=1) * rows.clamp(min=1))


def positive_weights(
    given: str | Mapping[Any, Any] | None, positives: np.ndarray, rows: int, labels: Sequence[str]
) -> Tensor | None:
    """Return the weights of positive examples (labels,), `pos_weight` of `torch.nn.BCEWithLogitsLoss`; None for 1.

    'balanced' is rows without the label / rows with it, and 1 for a label that all rows or no rows have.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        return named_weights(given, labels)
    with_it = torch.as_tensor(positives, dtype=torch.float32)
    without = rows - with_it
    return torch.where((with_it > 0) & (without > 0), without / with_it.clamp(min=1), 1.0)
