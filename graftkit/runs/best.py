"""Select which weights of a run to keep: those with the best value of one metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.errors import UserError, listing, nearest
from graftkit.tasks.base import Task


@dataclass(frozen=True)
class Best:
    """The metric that decides, and whether a larger ("max") or a smaller ("min") value is better."""

    figure: str
    direction: str

    def better(self, metrics: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
        """Return whether these metrics are better than the best so far.

        Ties are broken by the smaller loss; NaN is never better.
        """
        if self.figure not in metrics:
            known = [name for name, value in metrics.items() if isinstance(value, float)]
            raise UserError(
                f"train.best is {self.figure!r}, but the evaluation of these rows does not report it (reported: "
                f"{listing(known, 12)})."
            )
        if best is None or math.isnan(best[self.figure]):
            return best is None or not math.isnan(metrics[self.figure])
        return self._order(metrics) > self._order(best)

    def _order(self, metrics: Mapping[str, Any]) -> tuple[float, float]:
        value = metrics[self.figure]
        return (-value if self.direction == "min" else value), -metrics.get("loss", 0.0)


def best_of(task: Task, labels: Sequence[str], asked: str | None) -> Best:
    """Return the metric that selects the weights: the one in the recipe, or the task's first.

    Raises `UserError` if the task does not have it.
    """
    figures = task.figures(labels)
    if asked is not None and asked not in figures:
        raise UserError(
            f"train.best is {asked!r}, but {task.name}() cannot select weights by it (available: "
            f"{listing(figures)}).{nearest(asked, figures)}"
        )
    name = asked or next(iter(figures))
    return Best(name, figures[name])
