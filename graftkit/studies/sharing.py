"""How many runs of a study train at a time: measured once, and written to its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from graftkit.engine.parallel import device
from graftkit.errors import UserError, listing
from graftkit.files import read_json, write_json
from graftkit.recipe.schema import Recipe
from graftkit.runs.prepare import Rows
from graftkit.studies.forked import can_fork
from graftkit.studies.measuring import Cost, Pace, measure, pace_of
from graftkit.studies.side_by_side import SHARE, Chain, Job, cores, free_memory
from graftkit.studies.study import Study

PACE = "pace.json"


@dataclass(frozen=True)
class Kind:
    """The runs of one method. `recipe`, `rows`: one of them, with the rows of all; `chains` of `runs` each, of which `waits`
    wait for one another."""

    method: str
    recipe: Recipe
    rows: Rows
    chains: int
    runs: int
    waits: int


def set_pace(study: Study, kinds: Sequence[Kind], at_once: int) -> None:
    """Set the pace of a study: that with which it began, or what is fastest. `at_once`: runs of one method that do not wait for
    one another, at most.

    The number of threads of a run changes its results by rounding, so it stays the same when a study goes on. On a GPU, runs
    are made one after the other in this process.
    """
    if device().type != "cpu" or not can_fork():
        return
    threads = cores()
    pace, costs = _known(study)
    at_once = min(threads, at_once * len(kinds))
    study.pace = Pace(1, threads)
    if pace is not None or at_once > 1:
        share = pace.threads if pace is not None else threads // at_once
        costs |= _measured(study, [kind for kind in kinds if kind.method not in costs], threads, share)
    if pace is None:
        told = [
            (c, k.runs, k.waits)
            for k in kinds
            for _ in range(k.chains)
            if (c := costs.get(k.method)) is not None
        ]
        pace = pace_of(told, threads, at_once, SHARE * free_memory())
        beside = f", {pace.at_once} at a time with {pace.threads} thread{'s' * (pace.threads > 1)} each"
        number = sum(kind.chains * kind.runs for kind in kinds)
        study.console.line(f"{number} runs{beside * (pace.at_once > 1)}")
    study.pace, study.memory = pace, {method: cost.memory for method, cost in costs.items()}
    methods = {method: asdict(cost) for method, cost in costs.items()}
    write_json(study.folder / PACE, asdict(pace) | {"methods": methods})


def _measured(study: Study, kinds: Sequence[Kind], threads: int, share: int) -> dict[str, Cost]:
    """Return what a run of each method takes; without those that fail, as their runs will."""
    if not kinds:
        return {}
    study.console.line(f"measuring a run of {listing([kind.method for kind in kinds], 8)}")

    def chain() -> Chain:
        return (yield [Job(partial(measure, kind.recipe, kind.rows, threads, share)) for kind in kinds])

    found = study.all([chain()])[0]
    return {k.method: Cost(**cost) for k, cost in zip(kinds, found) if not isinstance(cost, UserError)}


def _known(study: Study) -> tuple[Pace | None, dict[str, Cost]]:
    """Return the pace with which a study began, and what its runs take; None and nothing if that is not known."""
    try:
        found = read_json(study.folder / PACE)
        costs = {str(method): Cost(**values) for method, values in found["methods"].items()}
        return Pace(max(1, int(found["at_once"])), max(1, int(found["threads"]))), costs
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None, {}
