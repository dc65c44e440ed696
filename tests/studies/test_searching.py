"""The search of a learning rate, on a known curve instead of runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from graftkit.errors import UserError
from graftkit.runs.best import Best
from graftkit.studies.searching import Search
from graftkit.studies.study import Trial


def searched(best: float, count: int, diverges: float = math.inf, direction: str = "max") -> Search:
    """A search whose metric is highest at `best` times the default rate, and fails from `diverges` on."""

    def made(factor: float) -> Trial | UserError:
        if factor >= diverges:
            return UserError("the loss is not finite")
        value = 1 - 0.1 * math.log10(factor / best) ** 2
        return Trial(
            Path(), {"evaluation": {"accuracy": value if direction == "max" else -value, "loss": 0.5}}
        )

    search = Search(Best("accuracy", direction))
    done(search.run(count, lambda factors: together(map(made, factors))))
    return search


def together(found):
    """What a chain of work returns, without any work."""
    yield from ()
    return list(found)


def done(chain):
    for work in chain:
        raise AssertionError(work)


@pytest.mark.parametrize("best", [0.1, 0.4, 1.0, 2.0, 30.0])
def test_it_finds_the_neighbourhood_of_the_best_rate(best):
    for direction in ("max", "min"):
        search = searched(best, 5, direction=direction)
        assert len(search.trials) == 5
        assert abs(math.log10(search.best / best)) <= 0.5


def test_it_begins_with_the_default_and_goes_on_at_the_edge():
    assert list(searched(100.0, 4).trials) == [1.0, 3.1623, 10.0, 31.623]
    assert searched(100.0, 4).at_the_edge and not searched(1.0, 4).at_the_edge
    assert list(searched(1.0, 1).trials) == [1.0] and not searched(1.0, 1).at_the_edge


def test_rates_that_diverge_are_lowered_and_equal_ones_stay_near_the_default():
    search = searched(1.0, 3, diverges=0.5)
    assert list(search.trials) == [1.0, 0.31623, 0.1] and search.trials[1.0] is None
    assert search.best == 0.31623 and "not finite" in search.refused
    assert searched(1.0, 2, diverges=1e-9).best is None
    same = Search(Best("accuracy", "max"))
    one = Trial(Path(), {"evaluation": {"accuracy": 1.0, "loss": 0.1}})
    done(same.run(4, lambda factors: together([one for _ in factors])))
    assert same.best == 1.0
