"""A small search of the learning rate of one method, on rows that are held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from graftkit.errors import UserError
from graftkit.runs.best import Best
from graftkit.studies.study import Trial

Found = Trial | UserError
STEP = math.sqrt(10)  # between two factors on the learning rates, at first


@dataclass
class Search:
    """The trials of one method. `trials`: by factor on the method's learning rates; None: it could not be trained."""

    choice: Best
    trials: dict[float, Trial | None] = field(default_factory=dict)
    refused: str = ""  # why a trial failed

    @property
    def best(self) -> float | None:
        """The factor with the best evaluation; of equal ones that with the smaller loss, then the nearest to 1."""
        found: float | None = None
        for factor in sorted(self.trials, key=lambda f: abs(math.log(f))):
            metrics = self.evaluation(factor)
            if metrics is not None and (found is None or self.choice.better(metrics, self.evaluation(found))):
                found = factor
        return found

    def evaluation(self, factor: float) -> Mapping[str, Any] | None:
        trial = self.trials[factor]
        return None if trial is None else trial.result["evaluation"]

    @property
    def at_the_edge(self) -> bool:
        """Whether the best factor is the lowest or the highest of several, so that a better one may lie beyond."""
        best = self.best
        return len(self.trials) > 1 and best is not None and best in (min(self.trials), max(self.trials))

    def next(self) -> float:
        """Return the factor to try next: 1, above, below; then beyond the best if it is at the edge, else between it and
        the better of its neighbours."""
        best, tried = self.best, sorted(self.trials)
        if not tried:
            return 1.0
        if best is None:  # all have failed: the rates are too high
            return _round(tried[0] / STEP)
        if len(tried) == 1:
            return _round(best * STEP)
        place = tried.index(best)
        if place == 0:
            return _round(best / STEP)
        if place == len(tried) - 1:
            return _round(best * STEP)
        below, above = tried[place - 1], tried[place + 1]
        low, high = self.evaluation(below), self.evaluation(above)
        upward = high is not None and (low is None or self.choice.better(high, low))
        return _round(math.sqrt(best * (above if upward else below)))

    def run(
        self, count: int, train: Callable[[list[float]], Generator[Any, Any, list[Found]]]
    ) -> Generator[Any, Any, None]:
        """Make `count` trials. `train` makes those of some factors, side by side if it can: it is a chain of work
        (`side_by_side`), and returns a trial or a `UserError` for each."""
        known: dict[float, Found] = {}
        while len(self.trials) < count:
            factor = self.next()
            if factor not in known:  # the second does not depend on how good the first is
                ahead = [factor] if self.trials or count == 1 else [factor, _round(factor * STEP)]
                known |= zip(ahead, (yield from train(ahead)))
            found = known[factor]
            if isinstance(found, UserError):
                self.trials[factor], self.refused = None, str(found)
            else:
                self.trials[factor] = found


def _round(factor: float) -> float:
    return float(f"{factor:.5g}")  # so that 10 is reached in two steps
