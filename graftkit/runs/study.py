"""The folder of several runs that belong together, as those of a comparison: it can be interrupted and goes on."""

from __future__ import annotations

import gc
import hashlib
import itertools
import re
import shlex
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
from graftkit.recipe.schema import IN_MEMORY, Recipe
from graftkit.report.console import Console
from graftkit.runs.folder import RECIPE, RESULT
from graftkit.runs.prepare import Rows, prepare_rows
from graftkit.runs.saved import read_result
from graftkit.runs.scores import read_scores
from graftkit.runs.sizing import refuse_unfit
from graftkit.runs.tune import resume_run, run_recipe
from graftkit.tasks.base import Examples

RUNS = "runs"
REPORT = "report.html"


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
    """A folder with runs of one recipe. `kind`: the command that made it; `given`: what it was asked for."""

    kind: str
    folder: Path
    given: dict[str, Any]
    console: Console
    tables: Mapping[str, Any] = field(default_factory=dict)

    def run(self, recipe: Recipe, name: str) -> Trial:
        """Return the run of a recipe in the folder `name`: the finished one, or one that is resumed or made now.

        Raises `UserError` if it cannot be trained, and `Interrupted` on Ctrl-C.
        """
        folder = self.folder / RUNS / name
        if (folder / RESULT).is_file():
            return Trial(folder, read_result(folder / RESULT))
        quiet = Console(quiet=True)
        recipe = recipe.model_copy(update={"out": str(folder)})
        gc.collect()
        reset_peak_memory(device())
        try:
            with told_once():
                if (folder / RECIPE).is_file():
                    try:
                        return Trial(folder, resume_run(folder, quiet, tables=self.tables).result)
                    except UserError:  # killed so early, or changed: it is made again
                        pass
                run = run_recipe(recipe, quiet, tables=self.tables, overwrite=True)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted(f"stopped. Go on with: {self.how_to_go_on}") from None
        return Trial(folder, run.result)

    def is_finished(self, name: str) -> bool:
        return (self.folder / RUNS / name / RESULT).is_file()

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
                f"folder {str(study.folder)!r} holds files that are not of a {study.kind} ({listing(sorted(names), 5)}); name "
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
    """Return the folder, the settled recipe and the rows of a study. Raises `UserError` for a recipe whose runs cannot be
    compared; `nothing`: what there is not, with a task that uses the model unchanged."""
    refuse_unfit(recipe, kind)
    folder, recipe = folder_of(kind, recipe.out), settled(recipe)
    rows = prepare_rows(recipe, tables.get("train"), tables.get("eval"), tables.get("test"))
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
            f"{study.folder} holds a {study.kind} of another recipe: {listing(what, 3)}. Name another folder with --out, or go "
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
        raise UserError(f"{str(folder)!r} holds no {kind} to go on with (it has no {path.name}).")
    found = read_json(path)
    if not isinstance(found.get("recipe"), dict) or not all(
        isinstance(found.get(name), int) for name in numbers
    ):
        raise UserError(
            f"{path} does not describe a {kind}; restore it from a copy, or begin again with another --out."
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
