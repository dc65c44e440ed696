"""What is done with a finished run: load it, evaluate it, let it answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftkit import graft_files
from graftkit import recipe as recipes
from graftkit.backbone import Backbone
from graftkit.data.columns import find_columns
from graftkit.data.read import read_table
from graftkit.engine import parallel, precision
from graftkit.engine.frozen import Forward
from graftkit.engine.loop import predict as run_predict
from graftkit.errors import UserError
from graftkit.graft import Graft, load
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
    labels = tuple(about["labels"])
    backbone, _ = prepare_backbone(recipe.model, read_method(recipe.method), labels, seed=recipe.seed)
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
    table = read_table(data, encoding=settings.encoding, skip_bad=settings.skip_bad, name="data")
    named = {name: column for name, column in loaded.columns.items() if column in table.columns}
    columns = find_columns(table, loaded.task.columns, named)
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
    """Answers for texts (a list of strings, or of pairs), a file, or a table in memory."""
    loaded = load_run(Path(folder))
    if isinstance(given, list) and all(isinstance(text, str) for text in given):
        given = [{loaded.columns["text"]: text} for text in given]
        if "text_pair" in loaded.columns:
            raise UserError(
                "this run was trained on pairs of texts; give --data FILE, or a list of pairs in Python."
            )
    elif isinstance(given, list) and all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in given):
        names = loaded.columns["text"], loaded.columns.get("text_pair", "")
        given = [dict(zip(names, pair)) for pair in given]
    settings = loaded.recipe.data
    table = read_table(given, encoding=settings.encoding, skip_bad=settings.skip_bad, name="data")
    if len(table) == 0:
        raise UserError("there is no text to answer; give one or more, or --data FILE.")
    named = {
        name: column for name, column in loaded.columns.items() if column in table.columns and name != "label"
    }
    wanted = [
        column for column in loaded.task.columns if column.name in loaded.columns and column.name != "label"
    ]
    columns = find_columns(table, wanted, named)
    examples = loaded.task.examples(table, columns, loaded.labels, settings.skip_bad, targets=False)
    dataset = loaded.task.dataset(examples, loaded.backbone, loaded.max_length)
    logits = run_predict(loaded.graft, dataset, loaded.forward, BATCH)
    answers = loaded.task.answers(logits, loaded.labels)
    inputs = [{"text": text} for text in examples.texts]
    if examples.pairs is not None:
        inputs = [{**row, "text_pair": pair} for row, pair in zip(inputs, examples.pairs)]
    return [{**row, **answer} for row, answer in zip(inputs, answers)]


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
