"""What each row contributes to a metric, so that two runs can be compared row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class ByRow:
    """The part of a task that tells metrics by row."""

    def by_row(self, outcomes: Sequence[Any], dataset: Any, labels: Sequence[str]) -> dict[str, np.ndarray]:
        """Return metrics as (rows, 2) in fp64: the metric is the sum of the first column divided by that of the second.

        A metric that is no such ratio, such as macro F1 or a correlation, is left out.
        """
        return {}

    def unsure(self, outcomes: Sequence[Any], dataset: Any, labels: Sequence[str]) -> np.ndarray | None:
        """Return how unsure the answers to examples are, (examples,) from 0 to 1, if an answer has no probability of its own."""
        return None


def means(**values: Any) -> dict[str, np.ndarray]:
    """Return metrics that are means of values (rows,) in the form of `by_row`."""
    return {name: np.stack([np.asarray(v, float), np.ones(len(v))], axis=1) for name, v in values.items()}


def ratio(above: Any, below: Any) -> np.ndarray:
    """Return a metric that is the ratio of two sums of values (rows,) in the form of `by_row`."""
    return np.stack([np.asarray(above, float), np.asarray(below, float)], axis=1)
