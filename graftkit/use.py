"""What is done with a finished run: load it, evaluate it, let it answer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftkit import graft_files
from graftkit import recipe as recipes
from graftkit.backbone import Backbone
from graftkit.data.columns import find_again
from graftkit.data.read import SUFFIXES, read_table
from graftkit.engine import parallel, precision
from graftkit.engine.frozen import Forward
from graftkit.engine.loop import predict as run_predict
from graftkit.errors import UserError
from graftkit.graft import Graft
from graftkit.graft_files import load
from graftkit.methods.base import read as read_method
from graftkit.prepare import make_task, prepare_backbone
from graftkit.recipe import Recipe
from graftkit.tasks.base import Task

BATCH = 64


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
    backbone, _ = prepare_backbone(
        recipe.model, read_method(recipe.method), labels, weights=recipe.weights, seed=recipe.seed
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
    task = make_task(about["task"])
    return Loaded(recipe, backbone, graft, task, labels, about["columns"], about["max_length"], forward)


def evaluate(folder: str | Path, data: Any) -> dict[str, Any]:
    """Metrics of a run on labelled rows: a file, or a table in memory."""
    loaded = load_run(Path(folder))
    settings = loaded.recipe.data
    with _settings_of(folder):
        table = read_table(data, encoding=settings.encoding, skip_bad=settings.skip_bad, name="data")
        columns = find_again(table, loaded.task.columns, loaded.columns)
        examples = loaded.task.examples(table, columns, loaded.labels, settings.skip_bad)
    dataset = loaded.task.dataset(examples, loaded.backbone, loaded.max_length)
    logits = run_predict(
        loaded.graft, dataset, loaded.forward, 2 * loaded.recipe.train.batch_size
    )  # as `tune` does
    assert examples.targets is not None
    metrics = loaded.task.metrics(logits, examples.targets, loaded.labels)
    return {
        "run": str(folder),
        "metrics": metrics,
        "truncated": dataset.encoded.truncated,
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
    settings = loaded.recipe.data
    texts = _as_rows(given, loaded.columns)
    with _settings_of(folder):
        table = read_table(
            given if texts is None else texts,
            encoding=settings.encoding,
            skip_bad=settings.skip_bad and texts is None,
            name="data",
        )
        columns = find_again(table, loaded.task.columns, loaded.columns, leave_out=("label",))
        skip_bad = settings.skip_bad and texts is None
        examples = loaded.task.examples(table, columns, loaded.labels, skip_bad, targets=False)
    dataset = loaded.task.dataset(examples, loaded.backbone, loaded.max_length)
    logits = run_predict(loaded.graft, dataset, loaded.forward, BATCH)
    answers = loaded.task.answers(logits, loaded.labels)
    inputs: list[dict[str, Any]] = [{"text": text} for text in examples.texts]
    if texts is None:
        inputs = [{"row": number, **row} for number, row in zip(examples.table.numbers, inputs)]
    if examples.pairs is not None:
        inputs = [{**row, "text_pair": pair} for row, pair in zip(inputs, examples.pairs)]
    return {
        "predictions": [{**row, **found} for row, found in zip(inputs, answers)],
        "skipped": len(examples.skipped),
        "skipped_rows": list(examples.skipped),
    }


def _as_rows(given: Any, columns: dict[str, str]) -> list[dict[str, str]] | None:
    """Rows of a list of texts or of pairs, none of them empty; None for anything else."""
    if not isinstance(given, list):
        return None
    if not given:
        raise UserError("there is no text to answer; give one or more, or --data FILE.")
    single = all(isinstance(text, str) for text in given)
    if not single and not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in given):
        return None
    if single and "text_pair" in columns:
        raise UserError(
            "this run was trained on pairs of texts; give --data FILE, or a list of pairs in Python."
        )
    if not single and "text_pair" not in columns:
        raise UserError("this run was trained on single texts, but pairs are given; give a list of texts.")
    names = [columns[name] for name in ("text", "text_pair") if name in columns]
    rows = [dict(zip(names, [item] if single else item)) for item in given]
    for number, row in enumerate(rows, start=1):
        if any(isinstance(text, str) and not text.strip() for text in row.values()):
            raise UserError(f"text {number} of {len(rows)} is empty; there is nothing to answer.")
    return rows


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


@torch.no_grad()
def logits_of(loaded: Loaded, texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
    """Logits (rows, classes) of texts, in fp32."""
    from graftkit.data.encode import encode_texts
    from graftkit.data.read import Table
    from graftkit.tasks.base import Dataset, Examples

    table = Table({"text": list(texts)}, "texts", list(range(1, len(texts) + 1)), "row")
    encoded = encode_texts(loaded.backbone.processor, texts, pairs, loaded.max_length)
    dataset = Dataset(Examples(table, texts, pairs, None), encoded)
    return torch.from_numpy(run_predict(loaded.graft, dataset, loaded.forward, BATCH))
