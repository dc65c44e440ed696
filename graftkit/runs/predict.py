"""Load a finished run, evaluate it and predict with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from graftkit.backbone import Backbone
from graftkit.backbone.quantized import move
from graftkit.backbone.source import Source
from graftkit.data.by_tokens import prediction_sizes
from graftkit.data.columns import find_again
from graftkit.data.stream import ROWS
from graftkit.engine import parallel, precision
from graftkit.engine.forward import Forward
from graftkit.engine.predict import predict as run_predict
from graftkit.errors import NoGoodRows, UserError, listing, nearest
from graftkit.grafts import folder as graft_files
from graftkit.grafts.graft import Graft
from graftkit.grafts.load import load
from graftkit.grafts.stored import DESCRIPTION
from graftkit.recipe import schema as recipes
from graftkit.recipe.schema import Recipe
from graftkit.report.finished import not_a_run
from graftkit.report.html import short
from graftkit.report.making import report_of_rows
from graftkit.report.table import check_path, held, writing
from graftkit.runs.confidence import Sure
from graftkit.runs.describing import previews
from graftkit.runs.folder import at_home
from graftkit.runs.given import labelled_rows, refuse_text, settings_of
from graftkit.runs.prepare import make_task, method_of, outputs_of, prepare_backbone, reading_of, source_of
from graftkit.runs.saved import read_result
from graftkit.tasks.base import Dataset, Examples, Task
from graftkit.tasks.shared.items import check_items

BATCH = 64
WORST_ROWS = 20
MESSAGES = 1000  # about bad rows, at most


@dataclass(frozen=True)
class Opened:
    """A finished run before its weights are read. `about`: what its graft says about it."""

    folder: Path
    recipe: Recipe
    task: Task
    about: Mapping[str, Any]
    moved: bool

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.about["labels"])

    @property
    def columns(self) -> dict[str, str]:
        return self.about["columns"]


@dataclass(frozen=True)
class Loaded:
    """A run in memory."""

    recipe: Recipe
    source: Source
    backbone: Backbone
    graft: Graft
    task: Task
    labels: tuple[str, ...]
    columns: dict[str, str]
    max_length: int
    forward: Forward


def open_run(
    folder: Path, options: Mapping[str, Any] | None = None, model: str | None = None, *, finished: bool = True
) -> Opened:
    """Read what a run says about itself.

    `options`: task options to override. `model`: the new location of the backbone, if it has moved. `finished`: raise
    `UserError` if the run has no result yet.
    """
    if not folder.is_dir():
        raise UserError(f"run folder {str(folder)!r} does not exist.")
    if not (folder / "recipe.yaml").is_file():
        raise not_a_run(folder)
    if finished and not (folder / "result.json").is_file():
        raise UserError(
            f"the run in {folder} is not finished; resume it with `graftkit tune --resume {folder}`."
        )
    if finished:
        read_result(folder / "result.json")
    recipe = recipes.make(recipes.read(folder / "recipe.yaml"), str(folder / "recipe.yaml"), stored=True)
    recipe = at_home(recipe, folder)
    about = graft_files.read(folder / "graft").about
    if not {"labels", "precision", "task", "columns", "max_length"} <= set(about):
        raise UserError(
            f"{folder / 'graft' / DESCRIPTION} is missing or does not describe a run; restore it from a copy."
        )
    task = _with_options(make_task(about["task"]), options or {})
    if model is not None:
        recipe = recipe.model_copy(update={"model": model})
    return Opened(folder, recipe, task, about, model is not None)


def load_run(run: Opened, *, exact: bool = False, meta: bool = False) -> Loaded:
    """Load the backbone and graft of a run.

    `exact`: use fp32 throughout, instead of the run's number types. `meta`: shapes only, no weights are read.
    """
    recipe, about, task = run.recipe, run.about, run.task
    with _telling_of_moves(recipe.model, named=run.moved):
        source = source_of(recipe)
        backbone, _ = prepare_backbone(
            source, method_of(recipe), task, run.labels, meta=meta, seed=recipe.seed
        )
    device = parallel.device()
    with torch.device("meta") if meta else nullcontext():
        graft = load(backbone, run.folder / "graft")
    _check_outputs(run, source, graft)
    if meta:
        forward = Forward(graft, device, "fp32")
        return Loaded(
            recipe, source, backbone, graft, task, run.labels, run.columns, about["max_length"], forward
        )
    kind = "fp32" if exact else about["precision"]
    precision.cast(graft.model, graft.labels, kind)
    move(graft.model, device)
    graft.model.eval()
    config: Any = getattr(graft.model, "config", None)
    if config is not None:
        config.use_cache = False
    forward = Forward(graft, device, kind, finished=True)
    return Loaded(
        recipe, source, backbone, graft, task, run.labels, run.columns, about["max_length"], forward
    )


def _check_outputs(run: Opened, source: Source, graft: Graft) -> None:
    """Raise `UserError` if the head has another number of outputs than the labels need: one of the two was changed."""
    if not run.task.head:
        return
    try:
        graft.method.for_outputs(outputs_of(source, run.task, run.labels))
    except UserError as error:
        raise UserError(
            f"{run.folder / 'graft' / DESCRIPTION}: labels and method do not belong together ({error}) Restore it from a copy."
        ) from None


@contextmanager
def _telling_of_moves(model: str, named: bool) -> Iterator[None]:
    """Add advice to the error if the backbone of a run has moved."""
    try:
        yield
    except UserError as error:
        if named or ":" in model or Path(model).expanduser().is_dir():
            raise
        raise UserError(
            f"{error} If the model of this run has moved, give its new location: --model FOLDER, or model=... in Python."
        ) from None


def _with_options(task: Task, options: Mapping[str, Any]) -> Task:
    for name in options:
        if name not in task.using:
            raise UserError(
                f"{task.name}() has no option {name!r} that can be changed in a finished run (available: "
                f"{listing(task.using, 12) or 'none'}).{nearest(name, task.using)}"
            )
    return replace(task, **options) if options else task  # type: ignore[type-var]


def evaluate(
    folder: str | Path, data: Any, options: Mapping[str, Any] | None = None, *, model: str | None = None,
    report: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the metrics of a run on labelled rows: a file, or a table in memory.

    `options`: task options to override. `model`: the new location of the backbone, if it has moved. `report`: an HTML file
    to write a report of these rows to.
    """
    run = open_run(Path(folder), options, model)
    task, examples = run.task, labelled_rows(run, data, "eval")
    loaded = load_run(run)
    dataset = task.dataset(examples, loaded.backbone, loaded.max_length)
    sure = Sure(run.folder, run.about, task)
    recorder = sure.recording(loaded.forward, dataset)
    outcomes = run_predict(dataset, recorder, task, *prediction_sizes(loaded.recipe.train))  # as `tune`
    found: dict[str, Any] = {
        "run": str(folder),
        "metrics": task.metrics(outcomes, dataset, loaded.labels),
        "worst": task.worst(outcomes, dataset, loaded.labels, WORST_ROWS),
        "headline": list(task.headline),
        "truncated": dataset.truncated,
        "skipped": len(dataset.examples.skipped),
        "confidence": sure.errors(),
    }
    if report is not None:
        shown = previews(task, dataset.examples, found["worst"])
        found["report"] = report_of_rows(
            Path(folder), found["metrics"], found["worst"], shown, short(data), report
        )
    return found


def predict(
    folder: str | Path, given: Any, options: Mapping[str, Any] | None = None, *, model: str | None = None,
    coverage: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Predict for texts (a list of strings, or of pairs), a file, or a table in memory.

    Answers for a file or a table include their `row`: the line of a text file, otherwise the 1-based position.
    `options`: task options to override. `model`: the new location of the run's backbone, if it has moved. `coverage`: add
    `labels` to each answer, a set that holds the right label with this probability.
    """
    return answer(folder, given, options, model=model, coverage=coverage)["predictions"]


def answer(
    folder: str | Path,
    given: Any,
    options: Mapping[str, Any] | None = None,
    show: Callable[[str], None] | None = None,
    model: str | None = None,
    coverage: float | None = None,
) -> dict[str, Any]:
    """Return the predictions and the number of bad rows skipped, with messages for the first 1,000.

    `show`: called with the pieces of a single answer as it is generated, if the task supports that; `streamed` in the
    result says whether it did.
    """
    answers = Answers(folder, given, options, show=show, model=model, coverage=coverage)
    predictions = list(answers)
    return {
        "predictions": predictions,
        "lines": [answers.line(row) for row in predictions],
        "streamed": answers.streamed,
        "skipped": answers.skipped,
        "skipped_rows": answers.skipped_rows,
    }


def stream(
    folder: str | Path, given: Any, options: Mapping[str, Any] | None = None, *, rows: int = ROWS,
    model: str | None = None, coverage: float | None = None,
) -> Answers:  # fmt: skip
    """Yield the answers of `predict` one by one while reading a file of any size, `rows` rows at a time."""
    return Answers(folder, given, options, rows, model=model, coverage=coverage)


def predict_into(
    folder: str | Path, given: Any, out: str | Path, options: Mapping[str, Any] | None = None, *, overwrite: bool = False,
    rows: int = ROWS, tell: Callable[[int], None] | None = None, model: str | None = None, coverage: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the answers of `predict` to a file (.jsonl, .csv, .tsv, .parquet) atomically, `rows` rows at a time.

    The result counts the `rows` answered and `skipped`; `skipped_rows` has a message for each of the first 1,000 bad rows.
    `tell`: called with the number of answers so far.
    """
    path = Path(out).expanduser()
    check_path(path, str(given) if isinstance(given, str | Path) else None, overwrite)
    answers, count = Answers(folder, given, options, rows, model=model, coverage=coverage), 0
    with held(path) as beside, writing(path, beside) as write:
        check_path(path, None, overwrite)  # another prediction may have finished there in between
        for piece in answers.pieces():
            write(piece)
            count += len(piece)
            if tell is not None:
                tell(count)
        check_path(path, None, overwrite)  # another process may have written it meanwhile
    return {
        "out": str(path), "rows": count, "skipped": answers.skipped, "skipped_rows": answers.skipped_rows,
    }  # fmt: skip


class Answers:
    """The answers of a run, computed lazily; each iteration reads the rows again.

    `skipped`: the number of bad rows skipped so far; `skipped_rows`: a message for each of the first 1,000. `streamed`:
    whether a single answer was shown as it was generated.
    """

    def __init__(
        self, folder: str | Path, given: Any, options: Mapping[str, Any] | None = None, rows: int = ROWS,
        show: Callable[[str], None] | None = None, model: str | None = None, coverage: float | None = None,
    ) -> None:  # fmt: skip
        if isinstance(given, str) and not os.path.exists(os.path.expanduser(given)):
            refuse_text(given)
        self.folder, self.rows, self.show = folder, rows, show
        self.run = open_run(Path(folder), options, model)
        task = self.run.task
        self.sure = Sure(self.run.folder, self.run.about, task, coverage)
        if isinstance(given, list):
            check_items(given, task.modality)
        items = task.given(given, self.run.columns) if isinstance(given, list) else None
        self.numbered = items is None
        self.given = given if items is None else items
        reading = reading_of(self.run.recipe)
        self.reading = reading if items is None else replace(reading, skip_bad=False)
        self._begin()

    @cached_property
    def loaded(self) -> Loaded:
        """The run in memory, once the first rows are read."""
        return load_run(self.run)

    def _begin(self) -> None:
        self.skipped, self.streamed = 0, False
        self.skipped_rows: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for piece in self.pieces():
            yield from piece

    def line(self, answer: dict[str, Any]) -> str:
        """Format one answer for the terminal."""
        return self.run.task.line(answer)

    def pieces(self) -> Iterator[list[dict[str, Any]]]:
        """Yield non-empty lists of answers. Raises `UserError` for a bad row, or if all rows are bad."""
        self._begin()
        none_good: NoGoodRows | None = None
        answered = False
        for examples in self._examples():
            if isinstance(examples, NoGoodRows):
                none_good = none_good or examples
                self._leave_out(examples.skipped)
                continue
            dataset = self.loaded.task.dataset(examples, self.loaded.backbone, self.loaded.max_length)
            self._leave_out(dataset.examples.skipped)
            yield self._answer(dataset)
            answered = True
        if none_good is not None and not answered:
            raise none_good

    def _examples(self) -> Iterator[Examples | NoGoodRows]:
        run, task = self.run, self.run.task
        columns: dict[str, str] | None = None
        with settings_of(self.folder):
            for table in task.pieces(self.given, self.reading, "data", self.rows):
                if not len(table):
                    self._leave_out(table.skipped)
                    continue
                columns = columns or find_again(table, task.columns, run.columns, leave_out=task.labelled)
                try:
                    examples = task.examples(table, columns, run.labels, self.reading.skip_bad, targets=False)
                except NoGoodRows as error:
                    yield error
                else:
                    yield examples

    def _answer(self, dataset: Dataset) -> list[dict[str, Any]]:
        task, examples = self.loaded.task.scaled(self.sure.temperature), dataset.examples
        shown = None
        if self.show is not None and len(dataset) == 1:
            shown = task.stream(self.loaded.forward, dataset, self.show)
        self.streamed = shown is not None
        forward = self.sure.watching(self.loaded.forward, dataset)
        outcomes = run_predict(dataset, forward, task, BATCH) if shown is None else shown
        answers = self.sure.added(task.answers(outcomes, dataset, self.loaded.labels))
        asked = [task.asked(examples, row) for row in range(len(examples))]
        if self.numbered:
            asked = [{"row": number, **row} for number, row in zip(examples.table.numbers, asked)]
        return [{**row, **found} for row, found in zip(asked, answers)]

    def _leave_out(self, messages: Sequence[str]) -> None:
        self.skipped += len(messages)
        self.skipped_rows += messages[: max(0, MESSAGES - len(self.skipped_rows))]
