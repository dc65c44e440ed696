"""Which weights of a run are kept: those of the evaluation that is best by one figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.errors import UserError, listing, nearest
from graftkit.tasks.base import Task


@dataclass(frozen=True)
class Best:
    """The figure that decides, and whether the larger ("max") or the smaller ("min") of it is better."""

    figure: str
    direction: str

    def better(self, metrics: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
        """Whether weights with these metrics are to be kept instead of the best so far. Where the figure is the same, the
        smaller loss decides; one that is no number is never better."""
        if self.figure not in metrics:
            known = [name for name, value in metrics.items() if isinstance(value, float)]
            raise UserError(
                f"train.best is {self.figure!r}, but the evaluation of these rows does not report it (it reports "
                f"{listing(known, 12)})."
            )
        if best is None or math.isnan(best[self.figure]):
            return best is None or not math.isnan(metrics[self.figure])
        return self._order(metrics) > self._order(best)

    def _order(self, metrics: Mapping[str, Any]) -> tuple[float, float]:
        value = metrics[self.figure]
        return (-value if self.direction == "min" else value), -metrics.get("loss", 0.0)


def best_of(task: Task, labels: Sequence[str], asked: str | None) -> Best:
    """What chooses the weights: the figure that the recipe names, else the task's first one.

    Raises `UserError` for one that the task does not have.
    """
    figures = task.figures(labels)
    if asked is not None and asked not in figures:
        raise UserError(
            f"train.best is {asked!r}, which is no figure that {task.name}() could choose weights by (there are: "
            f"{listing(figures)}).{nearest(asked, figures)}"
        )
    name = asked or next(iter(figures))
    return Best(name, figures[name])
