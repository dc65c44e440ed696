"""`graftkit curve`: whether more rows would help, by a learning curve over nested parts of the rows."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.errors import UserError
from graftkit.files import write_json, write_text
from graftkit.insight.paired import Group, draws_rows, interval, resampled
from graftkit.insight.power_law import FEWEST, fit
from graftkit.recipe import schema as recipes
from graftkit.recipe.schema import Recipe
from graftkit.report.console import Console, duration
from graftkit.report.learning import curve_lines, curve_page, sentence
from graftkit.runs.best import Best, best_of
from graftkit.runs.folder import RESULT
from graftkit.runs.prepare import Rows, drawn_from, rehearse, source_of
from graftkit.studies.sharing import Kind, set_pace
from graftkit.studies.sizing import measured_on, sized
from graftkit.studies.study import REPORT, Study, Trial, begun, group_of, opened, stored

KIND = "curve"
POINTS, SEEDS = 4, 3
AHEAD = (2, 4)  # times the rows that are predicted
LEAST = 4  # rows


@dataclass(frozen=True)
class Curve:
    """A finished learning curve: its folder, and the content of its `result.json`."""

    path: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """How a curve is drawn: `points` numbers of rows, each half of the next, with `seeds` draws of each."""

    points: int = POINTS
    seeds: int = SEEDS

    def check(self) -> None:
        if not FEWEST <= self.points <= 12:
            raise UserError(f"--points is {self.points}; it must be from {FEWEST} to 12.")
        if not 1 <= self.seeds <= 100:
            raise UserError(f"--seeds is {self.seeds}; it must be from 1 to 100.")

    def sizes(self, rows: int) -> list[int]:
        """Return the numbers of rows, the fewest first. Raises `UserError` if there are too few rows."""
        found = [round(rows / 2**halvings) for halvings in reversed(range(self.points))]
        if found[0] < LEAST:
            raise UserError(
                f"{rows:,} rows are too few for a curve of {self.points} points, each with half the rows of the next: the first "
                f"would have {found[0]}. Ask for fewer --points, or add rows."
            )
        return found


def curve(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None, *, points: int = POINTS, seeds: int = SEEDS,
    model: str | None = None, task: str | None = None, train: Any = None, eval: Any = ..., test: Any = None,
    method: Any = None, out: str | Path | None = None, settings: Mapping[str, Any] | None = None, quiet: bool = True,
) -> Curve:  # fmt: skip
    """Train on nested parts of the rows, and tell whether more rows would help: `graftkit curve` in Python.

    `points`: numbers of rows, each half of the next. `seeds`: draws of the rows, and runs, for each number. The other
    arguments are those of `tune`. Raises `UserError` for a mistake in any of them.
    """
    given = {"train": train, "eval": eval, "test": test}
    named = {"model": model, "task": task, "method": method, "out": out}
    values, tables = recipes.gather(recipe, given, named, settings)
    recipe = recipes.make(values | {"out": None if out is None else str(out)})
    return run_curve(recipe, Asked(points, seeds), Console(quiet=quiet), tables=tables)


def resume_curve(folder: Path, console: Console) -> Curve:
    """Go on with a curve that was interrupted. Raises `UserError` if the folder holds none."""
    folder = folder.expanduser().absolute()
    given = stored(KIND, folder, ("points", "seeds"))
    recipe = recipes.make(
        given["recipe"] | {"method": given.get("method")}, str(folder / f"{KIND}.json"), stored=True
    )
    return run_curve(
        recipe.model_copy(update={"out": str(folder)}), Asked(given["points"], given["seeds"]), console
    )


def run_curve(
    recipe: Recipe, asked: Asked, console: Console, *, tables: Mapping[str, Any] | None = None
) -> Curve:
    """Draw a learning curve into a folder: the recipe's `out`, or a new one under runs/."""
    asked.check()
    tables = tables or {}
    folder, recipe, rows = begun(KIND, recipe, tables, "rows to train on do not matter")
    sizes = asked.sizes(len(rows.train))
    recipe = sized(recipe, len(rows.train))
    given = {"method": recipe.method, "points": asked.points, "seeds": asked.seeds}
    study = Study(KIND, folder, given, console, tables, rows)
    whole = drawn_from(recipe, rows)
    choice = best_of(whole.task, rows.labels, recipe.train.best)
    rehearse(recipe, whole, source_of(recipe))
    with opened(study, recipe, rows.train):
        number = len(sizes) * asked.seeds
        set_pace(study, [Kind(recipe.method or "", recipe, whole, 1, number, 1)], number)
        found = study.all([_train(study, recipe, choice, sizes, asked.seeds)])[0]
        trials = [found[place : place + asked.seeds] for place in range(0, number, asked.seeds)]
        return _finish(study, recipe, whole, choice, sizes, trials)


def _train(
    study: Study, recipe: Recipe, choice: Best, sizes: Sequence[int], seeds: int
) -> Generator[Any, Any, list[Trial]]:
    """Return the runs on each number of rows, drawn with each seed. Yields the work."""
    held = recipe.seed if recipe.data.seed is None else recipe.data.seed
    wanted: dict[str, tuple[int, int]] = {
        f"rows{size}-seed{recipe.seed + number}": (size, recipe.seed + number)
        for size in sizes for number in range(seeds)
    }  # fmt: skip

    made: list[str] = []

    def ended(name: str, before: bool) -> None:
        made.append(name)
        (size, seed), result = wanted[name], study.trial(name).result
        took = "done before" if before else f"in {duration(result['seconds'])}"
        value = result["metrics"][choice.figure]
        study.console.line(
            f"{size:,} rows, seed {seed}: {choice.figure} {value:.4f}, {took} ({len(made)} of {len(wanted)})"
        )

    def of(size: int, seed: int) -> Recipe:
        data = recipe.data.model_copy(update={"rows": size, "seed": held})
        return recipe.model_copy(update={"data": data, "seed": seed})

    found = yield from study.runs([(of(*which), name) for name, which in wanted.items()], ended)
    for trial in found:
        if isinstance(trial, UserError):
            raise trial
    return [trial for trial in found if isinstance(trial, Trial)]


def _finish(
    study: Study, recipe: Recipe, rows: Rows, choice: Best, sizes: Sequence[int], trials: Sequence[Sequence[Trial]]
) -> Curve:  # fmt: skip
    """Fit the curve, and write and show the result."""
    groups = [group_of(part, choice.figure) for part in trials]
    result: dict[str, Any] = {
        "curve": str(study.folder), "task": recipe.task, "model": recipe.model, "method": recipe.method,
        "metric": choice.figure, "direction": choice.direction, **measured_on(recipe, rows), "steps": recipe.train.steps,
        "seeds": len(trials[0]), **extrapolated(sizes, groups, choice.direction),
        "runs": [str(trial.path) for part in trials for trial in part], "report": str(study.folder / REPORT),
    }  # fmt: skip
    result["sentence"] = sentence(result)
    write_text(study.folder / REPORT, curve_page(result))
    write_json(study.folder / RESULT, result)
    curve_lines(study.console, result)
    return Curve(study.folder, result)


def extrapolated(sizes: Sequence[int], groups: Sequence[Group], direction: str) -> dict[str, Any]:
    """Return the `points` of a learning curve, the power law through them (`fit`), and what it predicts for more rows.

    The error is the metric itself if smaller is better, else 1 minus it. Intervals are of curves that are fitted to
    resamples of rows and seeds. `gain` is the difference to the value that the law has for all rows, positive if better.
    """
    x = np.array(sizes, float)
    sign = 1 if direction == "min" else -1
    offset = 0.0 if direction == "min" else 1.0

    def errors(values: np.ndarray) -> np.ndarray:
        return offset + sign * values

    means, drawn = np.array([group.mean for group in groups]), resampled(groups).T  # (resamples, points)
    law, laws = fit(x, errors(means[None])), fit(x, errors(drawn))
    told = draws_rows(groups) or len(groups[0].values) > 1
    points = [
        {"rows": size, "mean": group.mean, "values": list(group.values), "interval": interval(drawn[:, i]) if told else None}
        for i, (size, group) in enumerate(zip(sizes, groups))
    ]  # fmt: skip
    predicted = []
    for times in AHEAD:
        more = times * sizes[-1]
        value, values = (sign * (one(more) - offset) for one in (law, laws))
        gain, gains = (one(sizes[-1]) - one(more) for one in (law, laws))
        predicted.append({
            "times": times, "rows": more, "value": float(value[0]), "interval": interval(values) if told else None,
            "gain": float(gain[0]), "gain_interval": interval(gains) if told else None,
        })  # fmt: skip
    fitted = {
        "formula": f"{'' if direction == 'min' else '1 - '}metric = floor + factor * rows^-exponent",
        "floor": float(law.floor[0]), "factor": float(law.factor[0]), "exponent": float(law.exponent[0]),
        "values": [float(sign * (law(size)[0] - offset)) for size in sizes],
    }  # fmt: skip
    return {"points": points, "fit": fitted, "predicted": predicted}
