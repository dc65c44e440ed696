"""The folder of a run: choose and hold it, and recognize its files."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from graftkit import claims
from graftkit.engine import checkpoint
from graftkit.errors import UserError, listing
from graftkit.recipe import schema as recipes
from graftkit.recipe.schema import IN_MEMORY, Recipe
from graftkit.report.finished import LR_FIND, METRICS, PLAN, PREVIEWS, RECIPE, REPORT, RESULT, WORST

CARD, GRAFT, CHECKPOINTS, TRACKERS, BEFORE_DECAY, INITIAL, MODEL, SCORES = (
    "README.md",
    "graft",
    "checkpoints",
    "trackers",
    "before-decay",
    "initial",
    "model",
    "scores.safetensors",
)
ENTRIES = (
    RECIPE,
    PLAN,
    METRICS,
    RESULT,
    CARD,
    GRAFT,
    CHECKPOINTS,
    WORST,
    PREVIEWS,
    REPORT,
    TRACKERS,
    BEFORE_DECAY,
    INITIAL,
    MODEL,
    LR_FIND,
    SCORES,
)
LEFTOVER = re.compile(rf"({'|'.join(map(re.escape, ENTRIES))})\.\d+\.part")


@contextmanager
def claimed(recipe: Recipe, overwrite: bool) -> Iterator[Path]:
    """Choose the folder of a new run, and hold it: no other process can start or resume a run there.

    Raises `UserError` if the folder already holds a run or other files. A run that wrote nothing leaves no folder behind.
    """
    with ExitStack() as stack:
        if recipe.out is None:
            yield stack.enter_context(_numbered(recipe))
            return
        folder = named(recipe.out)
        _refuse_used(folder, recipe.out, overwrite, claims.holder(folder))
        stack.enter_context(held(folder))
        _refuse_used(folder, recipe.out, overwrite)  # another run may have finished there in between
        yield folder


def held(folder: Path) -> AbstractContextManager[Path]:
    """Hold the folder of a run. Raises `UserError` if another process is using it."""
    return claims.held(folder, f"run folder {str(folder)!r}")


def named(out: str) -> Path:
    """Return the folder that a recipe names, with links resolved. Raises `UserError` if that is impossible."""
    try:
        return Path(out).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a symbolic link to itself
        raise UserError(f"run folder {out!r} cannot be used: {error}.") from None


@contextmanager
def _numbered(recipe: Recipe) -> Iterator[Path]:
    """Create a new folder under runs/, named after the task and the time."""
    name = "-".join([recipe.task.partition("(")[0], time.strftime("%Y%m%d-%H%M%S")])
    for number in itertools.count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}").absolute()
        with ExitStack() as stack:
            try:
                stack.enter_context(claims.claimed(folder, new=True))
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(
                    f"{str(folder.parent)!r} cannot be used: {error}. Name a folder with --out."
                ) from None
            yield folder
            return


def _refuse_used(folder: Path, out: str, overwrite: bool, holder: str | None = None) -> None:
    try:
        if folder.is_file():
            raise UserError(f"run folder {out!r} is a file; name a folder with --out.")
        names = (
            [path.name for path in folder.iterdir() if path.name != claims.LOCK] if folder.is_dir() else []
        )
    except OSError as error:  # no permission
        raise UserError(f"run folder {out!r} cannot be used: {error}.") from None
    if all(LEFTOVER.fullmatch(name) for name in names):
        return
    foreign = _foreign(folder, names)
    if foreign:
        raise UserError(
            f"folder {out!r} holds files that are not a run's ({listing(foreign, 5)}); name another with --out."
        )
    if not overwrite:
        at_work = "" if holder is None else f", and {holder} is writing to it"
        raise UserError(
            f"run folder {out!r} exists{at_work}. Resume it with `graftkit tune --resume {out}`, "
            "replace it with --overwrite, or name another with --out."
        )


def _foreign(folder: Path, names: list[str]) -> list[str]:
    """Return the entries that no run wrote: all of them if the files that a run writes first are missing."""
    foreign = sorted(name for name in names if name not in ENTRIES and not LEFTOVER.fullmatch(name))
    if foreign or PLAN in names:
        return foreign
    kept = sorted(name for name in names if not LEFTOVER.fullmatch(name))
    if kept == [INITIAL] and (folder / INITIAL / "config.json").is_file():
        return []
    return [] if kept in ([RECIPE], [INITIAL, RECIPE]) and _is_saved(folder) else kept


def _is_saved(folder: Path) -> bool:
    """Return whether the recipe was saved by a run that was then killed, not written by a person."""
    try:
        return recipes.read(folder / RECIPE).get("out") == str(folder)
    except UserError:
        return False


def at_home(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of a run with the initial model in its folder, if it has one, wherever that is now."""
    here = folder / INITIAL
    return recipe.model_copy(update={"model": str(here)}) if here.is_dir() else recipe


def clear(folder: Path, keep: Path | None = None) -> None:
    """Delete the files of a run, except `keep`, and nothing else. Raises `UserError` if that is not permitted.

    What is left if the process is killed says at no moment that it is finished, and is a run that can be resumed or
    overwritten: the result is deleted first, and what a run is recognized by last.
    """
    order = {RESULT: -1, PLAN: 1, RECIPE: 2}
    found = [path for path in folder.iterdir() if path != keep]
    own = [path for path in found if path.name in ENTRIES or LEFTOVER.fullmatch(path.name)]
    for path in sorted(own, key=lambda path: (order.get(path.name, 0), path.name)):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            raise UserError(f"{path} cannot be removed: {error.strerror or error}.") from None


def tidy(folder: Path) -> bool:
    """Delete what a finished run no longer needs. Return whether there was anything."""
    spent = [*checkpoint.existing(folder / CHECKPOINTS), *filter(claims.is_leftover, folder.rglob("*.part"))]
    for path in spent:
        claims.remove(path)
    return bool(spent)


def how_to_resume(recipe: Recipe, folder: Path) -> str:
    """Return the command that resumes a run, or the Python call if its rows were in memory."""
    names = [name for name in ("train", "eval", "test") if getattr(recipe.data, name) == IN_MEMORY]
    if not names:
        return f"graftkit tune --resume {shlex.quote(str(folder))}"
    given = ", ".join(f"{name}=..." for name in names)
    return f"graftkit.resume({str(folder)!r}, {given}) in Python, with the same rows"


def go_on(folder: Path) -> str:
    """Return how to train a finished run further.

    Its optimizer state is gone and its learning rate has decayed, so start a new run from its graft, or from the state
    before its decay if that was kept.
    """
    run = shlex.quote(str(folder))
    if checkpoint.existing(folder / BEFORE_DECAY):
        return (
            f"To train it further, go on from before its learning rate decayed, with N epochs in all: graftkit tune "
            f"{run}/recipe.yaml train.from={run} train.epochs=N --out NEW"
        )
    return (
        f"To train it further, start a new run from its graft: graftkit tune {run}/recipe.yaml train.from={run} "
        "train.epochs=N --out NEW"
    )
