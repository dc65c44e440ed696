"""`graftkit compare`: methods on the same rows, with the same number of steps, each at a learning rate that suits it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.errors import UserError
from graftkit.files import write_json, write_text
from graftkit.methods.base import read as read_method
from graftkit.optim.groups import rate
from graftkit.recipe import schema as recipes
from graftkit.recipe.catalogue import entries
from graftkit.recipe.schema import Recipe
from graftkit.recipe.sections import number_of
from graftkit.report.comparison import comparison_page, lines_of
from graftkit.report.console import Console, duration
from graftkit.runs.best import Best, best_of
from graftkit.runs.drawing import drawn, drawn_by_any, has_classes
from graftkit.runs.folder import GRAFT, RESULT
from graftkit.runs.prepare import Rows, drawn_from, prepare, source_of
from graftkit.studies.ranking import ranked
from graftkit.studies.searching import Search
from graftkit.studies.sharing import Kind, set_pace
from graftkit.studies.sizing import measured_on, sized
from graftkit.studies.study import REPORT, Study, Trial, begun, group_of, opened, slugs, stored

ALL = "all"
SEEDS, SEARCH = 3, 4
MOST = 100  # of seeds, trials, or rows of --few
KIND = "compare"


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: its folder, and the content of its `result.json`."""

    path: Path
    result: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each method, the best first."""
        return self.result["rows"]


@dataclass(frozen=True)
class Asked:
    """What is compared. `few`: numbers of rows per class to draw; empty: all rows."""

    methods: tuple[str, ...]
    seeds: int = SEEDS
    search: int = SEARCH
    few: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise `UserError` for values that make no sense."""
        if not self.methods:
            raise UserError(
                "name the methods to compare: --methods 'head()' 'lora(rank=8) + head()', or --methods all."
            )
        for name, value in (("seeds", self.seeds), ("search", self.search)):
            if not 1 <= value <= MOST:
                raise UserError(f"--{name} is {value}; it must be from 1 to {MOST}.")
        for count in self.few:
            if not 1 <= count <= 10**6:
                raise UserError(f"--few is {count}; it must be a number of rows per class from 1 up.")

    @property
    def at_once(self) -> int:
        """How many runs there are at most that do not wait for one another."""
        return len(self.few or (0,)) * max(min(self.search, 2), self.seeds - 1)  # of each method


@dataclass(frozen=True)
class Candidate:
    """A method that the task and the model take. `rates`: the learning rate of each part of the method."""

    method: str
    recipe: Recipe
    rates: dict[str, float]

    @property
    def rate(self) -> float:
        """The learning rate of its first part."""
        return next(iter(self.rates.values()))


def compare(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None, *, methods: Sequence[Any] = (), seeds: int = SEEDS,
    search: int = SEARCH, few: Sequence[int] = (), model: str | None = None, task: str | None = None, train: Any = None,
    eval: Any = ..., test: Any = None, out: str | Path | None = None, settings: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Comparison:  # fmt: skip
    """Compare methods on the same rows: `graftkit compare` in Python.

    `methods`: methods or expressions, or 'all'. `seeds`: runs of each method at its chosen learning rate. `search`: learning
    rates that are tried for each, with the first seed, on the evaluation rows. `few`: numbers of rows per class to draw,
    for learning curves. The other arguments are those of `tune`. With an `out` that holds an unfinished comparison of the
    same recipe, it goes on. Raises `UserError` for a mistake in any of them.
    """
    given = {"train": train, "eval": eval, "test": test}
    named = {"model": model, "task": task, "out": out}
    values, tables = recipes.gather(recipe, given, named, settings)
    texts = (methods,) if isinstance(methods, str) else tuple(map(str, methods))
    return run_compare(
        recipes.make(values | {"method": None, "out": None if out is None else str(out)}),
        Asked(texts, seeds, search, tuple(few)),
        Console(quiet=quiet),
        tables=tables,
    )


def resume_compare(folder: Path, console: Console) -> Comparison:
    """Go on with a comparison that was interrupted. Raises `UserError` if the folder holds none."""
    folder = folder.expanduser().absolute()
    given = stored(KIND, folder, ("seeds", "search"))
    recipe = recipes.make(given["recipe"], str(folder / f"{KIND}.json"), stored=True)
    asked = Asked(
        tuple(map(str, given.get("methods", ()))),
        given["seeds"],
        given["search"],
        tuple(map(int, given.get("few", ()))),
    )
    return run_compare(recipe.model_copy(update={"out": str(folder)}), asked, console)


def run_compare(
    recipe: Recipe, asked: Asked, console: Console, *, tables: Mapping[str, Any] | None = None
) -> Comparison:
    """Compare methods into a folder: the recipe's `out`, or a new one under runs/."""
    asked.check()
    tables = tables or {}
    folder, recipe, rows = begun(KIND, recipe, tables, "there are no methods to compare")
    few = tuple(sorted(set(asked.few)))
    if few and (rows.task.makes_model or not has_classes(rows.train, rows.labels)):
        raise UserError(
            f"--few draws rows of each class, but the rows of {rows.task.name}() have no single class each; leave it out. "
            "graftkit curve compares numbers of any rows."
        )
    for count in few:  # raises for too few rows
        at_most = drawn(_with_data(recipe, {"per_class": count}), rows.task, rows.train, rows.labels)
    recipe = sized(recipe, len(at_most) if few else len(rows.train))
    study = Study(KIND, folder, dataclasses.asdict(asked) | {"few": list(few)}, console, tables, rows)
    whole = drawn_from(recipe, rows)
    comparing = _Comparing(study, whole, best_of(whole.task, rows.labels, recipe.train.best), asked)
    candidates, refused = comparing.candidates(recipe)
    with opened(study, recipe, rows.train):
        sizes = few or (None,)
        kinds = [comparing.kind(one, sizes) for one in candidates]
        comparing.total = sum(kind.chains * kind.runs for kind in kinds)
        set_pace(study, kinds, asked.at_once)
        found = study.all([comparing.row(one, size) for size in sizes for one in candidates])
        return _finish(study, comparing, recipe, found, refused)


class _Comparing:
    """The work of one comparison."""

    def __init__(self, study: Study, rows: Rows, choice: Best, asked: Asked) -> None:
        self.study, self.rows, self.choice, self.asked = study, rows, choice, asked
        self.slugs: dict[str, str] = {}
        self.told: set[str] = set()
        self.total = 0  # runs, if none fails

    def candidates(self, recipe: Recipe) -> tuple[list[Candidate], list[dict[str, Any]]]:
        """Return the methods that can be trained, and a row for each that is refused. Of 'all', those that are refused are
        left out."""
        every = ALL in self.asked.methods
        named = [f"{name}()" for name in entries("method")] if every else []
        found: dict[str, Candidate] = {}
        refused = []
        found_once = source_of(recipe)
        source = found_once if found_once.made is None else None  # a user's module takes one graft
        for text in dict.fromkeys([*(one for one in self.asked.methods if one != ALL), *named]):
            if text in self.asked.methods:
                read_method(text)  # raises for a name that there is not, before anything is trained
            try:
                with_method = recipes.make(recipe.model_dump() | {"method": text})
                one = candidate(with_method, self.rows, source)
            except UserError as error:
                if text in self.asked.methods:
                    refused.append({"method": text, "refused": str(error)})
                    self.study.console.line(f"{text} is refused: {error}")
                continue
            same = next((known for known in found if read_method(known) == read_method(one.method)), None)
            if same is None:
                found[one.method] = one
            elif text in self.asked.methods:
                self.study.console.line(f"{text} is the same as {same}")
        if not found:
            why = "".join(f"; {one['method']}: {one['refused']}" for one in refused[:1])
            raise UserError(f"none of the methods can be trained{why or '.'}")
        self.slugs = slugs(found)
        return list(found.values()), refused

    def kind(self, one: Candidate, sizes: Sequence[int | None]) -> Kind:
        """Return the runs of a method with each number of rows per class, for the pace."""
        drawing = [self.recipe(one, few, 1.0, seed) for few in sizes[-1:] for seed in self.seeds(one)]
        rows = self.study.rows
        assert rows is not None
        train = drawn_by_any(drawing, rows.task, rows.train, rows.labels)
        task = rows.task.resolve(train, rows.labels, one.recipe.seed)
        asked = self.asked
        waits = max(1, asked.search - 1) + (asked.seeds > 1)
        return Kind(
            one.method, drawing[0], dataclasses.replace(rows, task=task, train=train), len(sizes),
            asked.search + asked.seeds - 1, waits,
        )  # fmt: skip

    def seeds(self, one: Candidate) -> list[int]:
        return [one.recipe.seed + number for number in range(self.asked.seeds)]

    def row(self, one: Candidate, few: int | None) -> Generator[Any, Any, dict[str, Any]]:
        """Return the row of one method: search its learning rate, and train it with each seed. Yields the work."""
        seeds = self.seeds(one)
        search = Search(self.choice)
        yield from search.run(
            self.asked.search, lambda factors: self.train(one, few, [(f, seeds[0]) for f in factors])
        )
        factor = search.best
        about: dict[str, Any] = {"method": one.method} | ({} if few is None else {"few": few})
        if factor is None:
            return about | {"refused": search.refused}
        found = yield from self.train(one, few, [(factor, seed) for seed in seeds])
        trials = [trial for trial in found if isinstance(trial, Trial)]
        failed = [
            f"seed {seed}: {error}" for seed, error in zip(seeds, found) if isinstance(error, UserError)
        ]
        return about | self.measured(trials) | {
            "learning_rate": one.rate * factor, "learning_rates": {k: v * factor for k, v in one.rates.items()},
            "lr_scale": factor,
            "tried": [
                {"learning_rate": one.rate * f, "value": None if (m := search.evaluation(f)) is None else m[self.choice.figure]}
                for f in sorted(search.trials)
            ],
            "at_the_edge": search.at_the_edge, "failed": failed, "_trials": trials,
        }  # fmt: skip

    def measured(self, trials: Sequence[Trial]) -> dict[str, Any]:
        results = [trial.result for trial in trials]
        return {
            "metric": self.choice.figure,
            "values": [result["metrics"][self.choice.figure] for result in results],
            "seeds": len(results),
            "seconds": round(statistics.median(result["seconds"] for result in results), 2),
            "peak_memory_bytes": int(statistics.median(map(_peak, results))),
            "trained_parameters": results[0]["trained_parameters"],
            "graft_bytes": sum(p.stat().st_size for p in (trials[0].path / GRAFT).rglob("*") if p.is_file()),
            "runs": [str(trial.path) for trial in trials],
        }

    def recipe(self, one: Candidate, few: int | None, factor: float, seed: int) -> Recipe:
        """Return the recipe of a run with a factor on its learning rates and a seed."""
        train = one.recipe.train.model_copy(update={"lr_scale": one.recipe.train.lr_scale * factor})
        data = {"seed": one.recipe.seed if one.recipe.data.seed is None else one.recipe.data.seed}
        data |= {} if few is None else {"per_class": few}
        return _with_data(one.recipe, data).model_copy(update={"train": train, "seed": seed})

    def train(
        self, one: Candidate, few: int | None, wanted: Sequence[tuple[float, int]]
    ) -> Generator[Any, Any, list[Trial | UserError]]:
        """Return the runs of a method with each factor and seed. Yields the work."""
        drawn_rows = "" if few is None else f"-few{few}"
        names = [
            f"{self.slugs[one.method]}{drawn_rows}-lr{one.rate * factor:.3g}-seed{seed}"
            for factor, seed in wanted
        ]
        of = dict(zip(names, wanted))

        def ended(name: str, before: bool) -> None:
            if name in self.told:  # the trial of the search is the first of the seeds
                return
            self.told.add(name)
            factor, seed = of[name]
            result = self.study.trial(name).result
            few_rows = "" if few is None else f", {few} rows per class"
            took = "done before" if before else f"in {duration(result['seconds'])}"
            value = result["metrics"][self.choice.figure]
            self.study.console.line(
                f"{one.method}{few_rows}, learning rate {one.rate * factor:.3g}, seed {seed}: "
                f"{self.choice.figure} {value:.4f}, {took} ({len(self.told)} of {self.total})"
            )

        recipes = [(self.recipe(one, few, *which), name) for name, which in of.items()]
        found = yield from self.study.runs(recipes, ended)
        for name, trial in zip(names, found):
            if isinstance(trial, UserError):
                self.study.console.line(f"{name} could not be trained: {trial}")
        return found


def _peak(result: Mapping[str, Any]) -> int:
    return result["peak_memory_bytes"]


def _with_data(recipe: Recipe, update: Mapping[str, Any]) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=dict(update))})


def candidate(recipe: Recipe, rows: Rows, source: Any = None) -> Candidate:
    """Return the method of a recipe with its learning rates. Raises `UserError` if the task or the model refuses it."""
    few = dataclasses.replace(rows, train=rows.train.take(range(min(8, len(rows.train)))))
    graft = prepare(recipe, few, source, meta=True).graft
    lr = number_of(recipe.train.lr)
    rates: dict[str, float] = {}
    for method in graft.method.methods:
        own = [rate(group, lr) for group in graft.labels.values() if group.method == method.name]
        if own:
            rates[method.name] = max(own)
    return Candidate(str(recipe.method), recipe, rates)


def _finish(
    study: Study, comparing: _Comparing, recipe: Recipe, found: list[dict[str, Any]], refused: list[dict[str, Any]]
) -> Comparison:  # fmt: skip
    """Compare the runs, and write and show the result."""
    choice = comparing.choice
    trained = [row for row in found if "refused" not in row]
    groups = [group_of(row.pop("_trials"), choice.figure) for row in trained]
    result = {
        "compare": str(study.folder), "task": recipe.task, "model": recipe.model, "metric": choice.figure,
        "direction": choice.direction, **measured_on(recipe, comparing.rows), "steps": recipe.train.steps,
        "search": comparing.asked.search,
        **({} if study.pace is None else dataclasses.asdict(study.pace)),
    }  # fmt: skip
    made = ranked(trained, groups, choice)
    result |= made | {"notes": [*result["notes"], *made["notes"]]}
    result["rows"] += [row for row in found if "refused" in row] + refused
    result["report"] = str(study.folder / REPORT)
    write_text(study.folder / REPORT, comparison_page(result))
    write_json(study.folder / RESULT, result)
    lines_of(study.console, result)
    return Comparison(study.folder, result)
