"""The folder of several runs that belong together, as those of a comparison: it can be interrupted and goes on."""

from __future__ import annotations

import gc
import hashlib
import itertools
import re
import shlex
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from graftkit import claims
from graftkit.engine.memory import reset_peak_memory
from graftkit.engine.parallel import device
from graftkit.engine.tracking import flat
from graftkit.errors import Interrupted, Note, UserError, listing
from graftkit.files import read_json, write_json
from graftkit.insight.paired import Group
from graftkit.recipe.environment import without_forecasts
from graftkit.recipe.schema import IN_MEMORY, Recipe
from graftkit.report.console import Console
from graftkit.runs.folder import RECIPE, RESULT
from graftkit.runs.prepare import Rows, drawn_from, read_rows
from graftkit.runs.saved import read_result
from graftkit.runs.scores import read_scores
from graftkit.runs.tune import resume_run, run_recipe
from graftkit.studies.measuring import Pace
from graftkit.studies.side_by_side import Chain, Job, SideBySide, in_turn
from graftkit.studies.sizing import refuse_unfit
from graftkit.tasks.base import Examples

RUNS = "runs"
REPORT = "report.html"
NOUNS = {"compare": "comparison"}  # of commands that are no noun themselves
UNKNOWN = 1 << 62  # bytes: nothing else runs beside it


@dataclass(frozen=True)
class Trial:
    """One finished run of a study."""

    path: Path
    result: dict[str, Any]

    @property
    def scores(self) -> Mapping[str, np.ndarray]:
        return read_scores(self.path)


@dataclass
class Study:
    """A folder with runs of one recipe. `kind`: the command that made it; `given`: what it was asked for; `rows`: all rows that
    were read, from which runs draw theirs; `pace`: how many runs train at a time, each in a process of its own; None: one after
    the other, in this process. `memory`: bytes that a run takes, by method."""

    kind: str
    folder: Path
    given: dict[str, Any]
    console: Console
    tables: Mapping[str, Any] = field(default_factory=dict)
    rows: Rows | None = None
    pace: Pace | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)  # notes of runs that were shown

    def all(self, chains: Sequence[Chain]) -> list[Any]:
        """Do all work, and return the results of the chains. Raises `Interrupted` on Ctrl-C."""
        try:
            if self.pace is None:
                return in_turn(chains)
            return SideBySide(self.pace.at_once, self.pace.threads, self.told).run(chains)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted(f"stopped. Go on with: {self.how_to_go_on}") from None

    def runs(
        self, wanted: Sequence[tuple[Recipe, str]], ended: Callable[[str, bool], None]
    ) -> Generator[Any, Any, list[Trial | UserError]]:
        """Return the run of each recipe in the folder of its name, or why it cannot be trained. Yields the work: finished runs
        are not made again. `ended` is told the name of each run that is there, and whether it was before."""
        jobs: dict[str, Job] = {}
        for recipe, name in wanted:
            if self.is_finished(name):
                ended(name, True)
            else:
                memory = self.memory.get(recipe.method or "", UNKNOWN)
                jobs[name] = Job(partial(self.make, recipe, name), partial(ended, name, False), memory)
        outcomes = dict(zip(jobs, (yield list(jobs.values())))) if jobs else {}
        return [
            found if isinstance(found := outcomes.get(name), UserError) else self.trial(name)
            for _, name in wanted
        ]

    def make(self, recipe: Recipe, name: str) -> None:
        """Make the run of a recipe in the folder `name`, or resume it. Raises `UserError` if it cannot be trained."""
        folder = self.folder / RUNS / name
        quiet = Console(quiet=True)
        recipe = recipe.model_copy(update={"out": str(folder)})
        rows = None if self.rows is None else drawn_from(recipe, self.rows)
        gc.collect()
        reset_peak_memory(device())
        with told_once(), without_forecasts():
            if (folder / RECIPE).is_file():
                try:
                    resume_run(folder, quiet, tables=self.tables, rows=rows)
                    return
                except UserError:  # killed so early, changed or damaged: it is made again
                    pass
            run_recipe(recipe, quiet, tables=self.tables, overwrite=True, rows=rows)

    def trial(self, name: str) -> Trial:
        """Return a finished run. Raises `UserError` if its result is damaged."""
        folder = self.folder / RUNS / name
        return Trial(folder, read_result(folder / RESULT))

    def is_finished(self, name: str) -> bool:
        try:
            return self.trial(name).result is not None
        except UserError:  # not there, or damaged
            return False

    @property
    def how_to_go_on(self) -> str:
        if self.tables:
            return f"graftkit.{self.kind}(..., out={str(self.folder)!r}) in Python, with the same arguments"
        return f"graftkit {self.kind} --resume {shlex.quote(str(self.folder))}"


@contextmanager
def told_once() -> Iterator[None]:
    """Show each note once, and not for every run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("once", category=Note)
        yield


@contextmanager
def opened(study: Study, recipe: Recipe, rows: Examples) -> Iterator[Study]:
    """Hold the folder of a study, and write down what it is of. Raises `UserError` if it holds that of another recipe, of
    other rows, or anything else."""
    with ExitStack() as stack:
        stack.enter_context(claims.held(study.folder, f"folder {str(study.folder)!r}"))
        path = study.folder / f"{study.kind}.json"
        now = {"recipe": _described(recipe), "rows": digest_of(rows), **study.given}
        if path.is_file():
            _refuse_another(study, read_json(path), now)
        elif names := [
            p.name for p in study.folder.iterdir() if p.name != claims.LOCK and not claims.is_leftover(p)
        ]:
            raise UserError(
                f"folder {str(study.folder)!r} holds files that are not of a {noun(study.kind)} ({listing(sorted(names), 5)}); name "
                "another with --out."
            )
        claims.remove_leftovers(study.folder)
        write_json(path, now)
        yield study


def group_of(trials: Sequence[Trial], figure: str) -> Group:
    """Return the values of runs that differ in their seed alone, with the scores of their rows."""
    scores = [found for trial in trials if (found := trial.scores.get(figure)) is not None]
    return Group([trial.result["metrics"][figure] for trial in trials], scores)


def begun(
    kind: str, recipe: Recipe, tables: Mapping[str, Any], nothing: str
) -> tuple[Path, Recipe, Rows]:  # fmt: skip
    """Return the folder, the settled recipe and all rows of a study. Raises `UserError` for a recipe whose runs cannot be
    compared; `nothing`: what there is not, with a task that uses the model unchanged."""
    refuse_unfit(recipe, kind)
    folder, recipe = folder_of(kind, recipe.out), settled(recipe)
    rows = read_rows(recipe, tables.get("train"), tables.get("eval"), tables.get("test"))
    if not rows.task.trains:
        raise UserError(f"{rows.task.name}() uses the model unchanged, so {nothing}.")
    return folder, recipe, rows


def settled(recipe: Recipe) -> Recipe:
    """Return a recipe that means the same from any working folder."""

    def absolute(path: Any) -> Any:
        there = isinstance(path, str) and path != IN_MEMORY and Path(path).expanduser().exists()
        return str(Path(path).expanduser().absolute()) if there else path

    data = {name: absolute(getattr(recipe.data, name)) for name in ("train", "eval", "test")}
    train = {"start": absolute(recipe.train.start)}
    return recipe.model_copy(update={
        "model": absolute(recipe.model), "weights": absolute(recipe.weights),
        "data": recipe.data.model_copy(update=data), "train": recipe.train.model_copy(update=train),
    })  # fmt: skip


def _described(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump() | {"out": None, "method": None}


def _refuse_another(study: Study, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UserError` if a folder was made for something else. Methods, seeds and trials may be added."""
    one, other = flat(before.get("recipe") or {}), flat(now["recipe"])
    one |= {key: before.get(key) for key in ("few", "rows", "method", "points") if key in now}
    other |= {key: now[key] for key in ("few", "rows", "method", "points") if key in now}
    different = [key for key in other if str(one.get(key)) != str(other[key])]
    if different:
        what = [
            "the rows have changed" if key == "rows" else f"{key} was {one.get(key)} and is {other[key]}"
            for key in different
        ]
        raise UserError(
            f"{study.folder} holds a {noun(study.kind)} of another recipe: {listing(what, 3)}. Name another folder with --out, or go "
            f"on with it as it began: {study.how_to_go_on}."
        )


def digest_of(rows: Examples) -> str:
    """Return a digest of the rows that a study trains on and holds out."""
    digest = hashlib.sha256()
    for name, values in sorted(rows.values.items()):
        digest.update(name.encode())
        for value in values:
            digest.update(repr(value)[:10_000].encode("utf-8", "surrogatepass"))
    targets: Any = rows.targets
    digest.update(targets.tobytes() if isinstance(targets, np.ndarray) else repr(targets).encode())
    return digest.hexdigest()


def noun(kind: str) -> str:
    return NOUNS.get(kind, kind)


def folder_of(kind: str, out: str | Path | None) -> Path:
    """Return the folder that is named, or a new name under runs/."""
    if out is not None:
        return Path(out).expanduser().absolute()
    name = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}").absolute()
        if not folder.exists():
            return folder
    raise AssertionError


def stored(kind: str, folder: Path, numbers: Iterable[str]) -> dict[str, Any]:
    """Return what a study is of, with its `numbers`. Raises `UserError` if the folder holds none, if its description is
    damaged, or if its rows were in memory."""
    path = folder / f"{kind}.json"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} holds no {noun(kind)} to go on with (it has no {path.name}).")
    found = read_json(path)
    if not isinstance(found.get("recipe"), dict) or not all(
        isinstance(found.get(name), int) for name in numbers
    ):
        raise UserError(
            f"{path} does not describe a {noun(kind)}; restore it from a copy, or begin again with another --out."
        )
    if IN_MEMORY in (found["recipe"].get("data") or {}).values():
        raise UserError(
            f"the rows of {folder} were in memory. Go on with: graftkit.{kind}(..., out={str(folder)!r}) in Python, with the "
            "same arguments."
        )
    return found


def slugs(methods: Iterable[str]) -> dict[str, str]:
    """Return a different short name for each method, for names of folders."""
    found: dict[str, str] = {}
    for method in methods:
        name = re.sub(r"[^A-Za-z0-9.]+", "-", method).strip("-.")[:60] or "method"
        if name.lower() in (known.lower() for known in found.values()) or len(name) == 60:
            name = f"{name}-{hashlib.sha256(method.encode()).hexdigest()[:6]}"
        found[method] = name
    return found
