"""What is done with a finished run: load it, evaluate it, let it answer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftkit import graft_files
from graftkit import recipe as recipes
from graftkit.backbone import Backbone
from graftkit.data.columns import find_again
from graftkit.data.read import SUFFIXES
from graftkit.engine import parallel, precision
from graftkit.engine.frozen import Forward
from graftkit.engine.loop import predict as run_predict
from graftkit.errors import UserError
from graftkit.graft import Graft
from graftkit.graft_files import load
from graftkit.prepare import make_task, method_of, prepare_backbone, reading_of
from graftkit.recipe import Recipe
from graftkit.tasks.base import Task

BATCH = 64
WORST_ROWS = 20


@dataclass(frozen=True)
class Loaded:
    """A run in memory."""

    recipe: Recipe
    backbone: Backbone
    graft: Graft
    task: Task
    labels: tuple[str, ...]
    columns: dict[str, str]
    max_length: int
    forward: Forward


def load_run(folder: Path, *, exact: bool = False) -> Loaded:
    """Load backbone and graft of a run. `exact`: in fp32 throughout, instead of the run's number types."""
    if not folder.is_dir():
        raise UserError(f"run folder {str(folder)!r} does not exist.")
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{str(folder)!r} is not a run folder (it has no recipe.yaml).")
    if not (folder / "result.json").is_file():
        raise UserError(f"the run in {folder} is not finished; go on with `graftkit tune --resume {folder}`.")
    recipe = recipes.make(recipes.read(folder / "recipe.yaml"), str(folder / "recipe.yaml"))
    about = graft_files.read(folder / "graft").about
    if not {"labels", "precision", "task", "columns", "max_length"} <= set(about):
        raise UserError(
            f"{folder / 'graft' / graft_files.DESCRIPTION} is missing or does not describe a run; "
            "restore it from a copy."
        )
    labels = tuple(about["labels"])
    task = make_task(about["task"])
    backbone, _ = prepare_backbone(
        recipe.model, method_of(recipe), task, labels, weights=recipe.weights, seed=recipe.seed
    )
    graft = load(backbone, folder / "graft")
    device = parallel.device()
    kind = "fp32" if exact else about["precision"]
    precision.cast(graft.model, graft.labels, kind)
    graft.model.to(device)
    graft.model.eval()
    config: Any = getattr(graft.model, "config", None)
    if config is not None:
        config.use_cache = False
    forward = Forward(graft, device, kind)
    return Loaded(recipe, backbone, graft, task, labels, about["columns"], about["max_length"], forward)


def evaluate(folder: str | Path, data: Any) -> dict[str, Any]:
    """Metrics of a run on labelled rows: a file, or a table in memory."""
    loaded = load_run(Path(folder))
    reading, task = reading_of(loaded.recipe), loaded.task
    with _settings_of(folder):
        table = task.read(data, reading, "data")
        columns = find_again(table, task.columns, loaded.columns)
        examples = task.examples(table, columns, loaded.labels, reading.skip_bad)
    dataset = task.dataset(examples, loaded.backbone, loaded.max_length)
    outcomes = run_predict(
        dataset, loaded.forward, task, 2 * loaded.recipe.train.batch_size
    )  # as `tune` does
    return {
        "run": str(folder),
        "metrics": task.metrics(outcomes, dataset, loaded.labels),
        "worst": task.worst(outcomes, dataset, loaded.labels, WORST_ROWS),
        "headline": list(task.headline),
        "truncated": dataset.truncated,
        "skipped": len(examples.skipped),
    }


def predict(folder: str | Path, given: Any) -> list[dict[str, Any]]:
    """Answers for texts (a list of strings, or of pairs), a file, or a table in memory.

    Those for a file or a table have their `row` in it: the line of a text file, else the place, from 1.
    """
    return answer(folder, given)["predictions"]


def answer(folder: str | Path, given: Any) -> dict[str, Any]:
    """What `predict` gives, and how many bad rows were left out, with a message for each."""
    if isinstance(given, str) and not os.path.exists(os.path.expanduser(given)):
        _refuse_text(given)
    loaded = load_run(Path(folder))
    task = loaded.task
    items = task.given(given, loaded.columns) if isinstance(given, list) else None
    reading = reading_of(loaded.recipe)
    if items is not None:
        reading = replace(reading, skip_bad=False)
    with _settings_of(folder):
        table = task.read(given if items is None else items, reading, "data")
        columns = find_again(table, task.columns, loaded.columns, leave_out=task.labelled)
        examples = task.examples(table, columns, loaded.labels, reading.skip_bad, targets=False)
    dataset = task.dataset(examples, loaded.backbone, loaded.max_length)
    outcomes = run_predict(dataset, loaded.forward, task, BATCH)
    answers = task.answers(outcomes, dataset, loaded.labels)
    asked = [task.asked(examples, row) for row in range(len(examples))]
    if items is None:
        asked = [{"row": number, **row} for number, row in zip(examples.table.numbers, asked)]
    predictions = [{**row, **found} for row, found in zip(asked, answers)]
    return {
        "predictions": predictions,
        "lines": [task.line(row) for row in predictions],
        "skipped": len(examples.skipped),
        "skipped_rows": list(examples.skipped),
    }


def _refuse_text(given: str) -> None:
    if not given.strip():
        raise UserError("the name of the file of rows is empty.")
    if os.path.splitext(given)[1].lower() not in SUFFIXES:
        shown = given if len(given) <= 60 else given[:60] + " ..."
        raise UserError(f"{shown!r} is not a file. To answer texts, give a list of them: [{shown!r}].")


@contextmanager
def _settings_of(folder: str | Path) -> Iterator[None]:
    """A message that advises a setting says where it stands: a finished run is given none."""
    try:
        yield
    except UserError as error:
        if not re.search(r"\bdata\.(encoding|skip_bad)", str(error)):
            raise
        where = Path(folder) / "recipe.yaml"
        raise UserError(f"{str(error).rstrip('.')} (a setting of this run, in {where}).") from None
