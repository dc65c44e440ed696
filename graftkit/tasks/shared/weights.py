"""Weights of classes in a loss: 'balanced', or a number for each label that a recipe names."""

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
    """Raise `UserError` for a label that the training rows do not have, or a weight that is no positive number."""
    if not isinstance(given, Mapping):
        return
    index, seen = LabelIndex(labels), set()
    for key, weight in given.items():
        name = label_text(key)
        if index.find(name) is None:
            raise UserError(
                f"{task}(): class_weights names {name!r}, which is none of the {len(labels)} labels of the training rows "
                f"({listing(labels, 8)}).{nearest(name, labels)}"
            )
        if index.find(name) in seen:
            raise UserError(f"{task}(): class_weights names {name!r} twice.")
        seen.add(index.find(name))
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise UserError(
                f"{task}(): the class_weights of {name!r} is {weight!r}, but must be a number above 0."
            )


def named_weights(given: Mapping[Any, Any], labels: Sequence[str]) -> Tensor:
    """(labels,) float32; 1 for labels that are not named."""
    index, weights = LabelIndex(labels), torch.ones(len(labels))
    for key, weight in given.items():
        place = index.find(label_text(key))
        if place is not None:
            weights[place] = float(weight)
    return weights


def class_weights(
    given: str | Mapping[Any, Any] | None, counts: np.ndarray, labels: Sequence[str]
) -> Tensor | None:
    """(labels,) the weight of each class, with mean 1 over the training rows; None for all alike.

    `counts`: rows of each label. 'balanced' is rows / (classes with rows * rows of the class), as in scikit-learn. A
    weighted mean over all rows is that of `torch.nn.CrossEntropyLoss(weight=...)`.
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
    """(labels,) the weight of a label where it holds, the `pos_weight` of `torch.nn.BCEWithLogitsLoss`; None for 1.

    'balanced': rows without the label / rows with it; 1 for labels that all rows have, or none.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        return named_weights(given, labels)
    with_it = torch.as_tensor(positives, dtype=torch.float32)
    without = rows - with_it
    return torch.where((with_it > 0) & (without > 0), without / with_it.clamp(min=1), 1.0)
