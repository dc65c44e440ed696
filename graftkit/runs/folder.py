"""The folder of a run: which one it is, what is a run's in it, and whether its rows are still the same."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from graftkit.errors import UserError, listing
from graftkit.files import read_json
from graftkit.recipe import schema as recipes
from graftkit.recipe.schema import IN_MEMORY, Recipe
from graftkit.tasks.base import Dataset

RECIPE, PLAN, METRICS, RESULT, CARD, GRAFT, CHECKPOINTS, WORST = (
    "recipe.yaml",
    "plan.json",
    "metrics.jsonl",
    "result.json",
    "README.md",
    "graft",
    "checkpoints",
    "worst.jsonl",
)
ENTRIES = (RECIPE, PLAN, METRICS, RESULT, CARD, GRAFT, CHECKPOINTS, WORST)
LEFTOVER = re.compile(rf"({'|'.join(map(re.escape, ENTRIES))})\.\d+\.part")
ROWS = "rows_sha256"  # in the plan: a digest of each part of the data


def choose(recipe: Recipe, overwrite: bool) -> Path:
    """Where the run goes. Raises `UserError` where a run is there already, or anything else."""
    if recipe.out is None:
        name = "-".join([recipe.task.partition("(")[0], time.strftime("%Y%m%d-%H%M%S")])
        names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        return next(path for path in (Path("runs", n).absolute() for n in names) if not path.exists())
    try:
        folder = Path(recipe.out).expanduser().resolve()
        if folder.is_file():
            raise UserError(f"run folder {recipe.out!r} is a file; name a folder with --out.")
        names_there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except (OSError, RuntimeError) as error:  # no permission, or a link that leads to itself
        raise UserError(f"run folder {recipe.out!r} cannot be used: {error}.") from None
    if all(LEFTOVER.fullmatch(name) for name in names_there):
        return folder
    foreign = _foreign(folder, names_there)
    if foreign:
        raise UserError(
            f"folder {recipe.out!r} holds files that are not a run's ({listing(foreign, 5)}); name another with --out."
        )
    if not overwrite:
        raise UserError(
            f"run folder {recipe.out!r} exists. Go on with it by `graftkit tune --resume {recipe.out}`, "
            "replace it with --overwrite, or name another with --out."
        )
    return folder


def _foreign(folder: Path, names: list[str]) -> list[str]:
    """The entries that no run wrote; all of them where what a run writes first is not there."""
    foreign = sorted(name for name in names if name not in ENTRIES and not LEFTOVER.fullmatch(name))
    if foreign or PLAN in names:
        return foreign
    kept = sorted(name for name in names if not LEFTOVER.fullmatch(name))
    return [] if kept == [RECIPE] and _is_saved(folder) else kept


def _is_saved(folder: Path) -> bool:
    """Whether the only file is the recipe that a run saved before it was killed, not one that a person wrote."""
    try:
        return recipes.read(folder / RECIPE).get("out") == str(folder)
    except UserError:
        return False


def clear(folder: Path) -> None:
    """Delete what a run wrote, and nothing else. Raises `UserError` where that is not allowed."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in ENTRIES and not LEFTOVER.fullmatch(path.name):
            continue
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            raise UserError(f"{path} cannot be removed: {error.strerror or error}.") from None


def how_to_resume(recipe: Recipe, folder: Path) -> str:
    """The command, or the call where rows were in memory, that goes on with a run."""
    names = [name for name in ("train", "eval", "test") if getattr(recipe.data, name) == IN_MEMORY]
    if not names:
        return f"graftkit tune --resume {shlex.quote(str(folder))}"
    given = ", ".join(f"{name}=..." for name in names)
    return f"graftkit.resume({str(folder)!r}, {given}) in Python, with the same rows"


def digests(datasets: Mapping[str, Dataset], labels: tuple[str, ...]) -> dict[str, str]:
    """A digest of labels and rows for each part of the data."""
    names = "\0".join(labels)
    return {
        name: hashlib.sha256(f"{names}\n{dataset.digest()}".encode()).hexdigest()
        for name, dataset in datasets.items()
    }


def refuse_other_rows(folder: Path, recipe: Recipe, found: Mapping[str, str]) -> None:
    """Raise `UserError` where rows are not those that the run began with."""
    plan = read_json(folder / PLAN) if (folder / PLAN).is_file() else {}
    for name, digest in plan.get(ROWS, {}).items():
        if found.get(name) != digest:
            source = getattr(recipe.data, name)
            source = source if isinstance(source, str) else recipe.data.train  # a held-out share of it
            raise UserError(
                f"{source}: the {name} rows are not those that the run in {folder} began with (their texts, labels, "
                "order or tokens differ), so it cannot go on with them. Put the file back as it was, or start a new run."
            )
