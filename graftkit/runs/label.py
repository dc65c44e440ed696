"""Which rows to label next, and labels for them to correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.backbone.source import find_source
from graftkit.data.columns import find_again, find_columns
from graftkit.data.table import Table
from graftkit.engine.predict import predict as run_predict
from graftkit.errors import UserError, listing
from graftkit.insight.choosing import choose, uncertainty_of
from graftkit.insight.confidence_evidence import WORDS
from graftkit.insight.features import features_of
from graftkit.insight.knn import directions
from graftkit.insight.probe import fit_probe
from graftkit.insight.repeated import inputs_of
from graftkit.insight.targets import targets_of
from graftkit.recipe import schema as recipes
from graftkit.recipe.schema import IN_MEMORY
from graftkit.runs.confidence import Scaled, Sure
from graftkit.runs.features import Reading, bare_backbone, frozen_backbone
from graftkit.runs.fit import refuse_several_answers
from graftkit.runs.labels import by_example, file_of
from graftkit.runs.predict import BATCH, load_run, open_run
from graftkit.runs.prepare import make_task, prepare_rows, reading_of, source_of
from graftkit.tasks.base import Examples, Task

COUNT = 50
SHOWN = 3  # rows that a message names
Answers = list[dict[str, Any]]


def label_next(
    pool: Any, count: int = COUNT, *, run: str | Path | None = None, model: str | Path | None = None, train: Any = None,
    task: str | None = None, settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Choose the rows of an unlabelled pool to label next: `graftkit label next` in Python.

    They are uncertain, typical of other uncertain rows, and no near-duplicates of each other or of labelled rows
    (`graftkit.insight.choosing`). Uncertain are the answers of a finished `run`, or of a linear probe on the features of a
    `model` that is fitted to the labelled rows `train`. With a `model` alone, the rows are those that are typical of the pool.
    `pool` and `train` are files or tables in memory; rows of the pool that are among the labelled ones are left out.

    Returns `rows`, best first, each with its `row` (0-based), `file` and `line`, its inputs, and where there is a model of the
    answers the answer, its probability and `uncertainty` (0 to 1); `overlap`, the rows left out; `columns`, `label` (the
    names of these columns in the file) and `notes`. Raises `UserError` for a pool without inputs, or with none to label.
    """
    if count < 1:
        raise UserError(f"the number of rows to label is {count}; it must be at least 1.")
    judge = _judge(run, model, train, task, settings, "label next")
    overlap = judge.read(pool, once=True)
    answers, uncertainty = judge.told()
    features, labelled = judge.pool_features, judge.labelled_features
    unit = directions(features)
    chosen = choose(
        unit,
        count,
        uncertainty,
        None if labelled is None else directions(labelled, like=features),
        judge.seed,
    )
    if not chosen:
        raise UserError(
            f"all rows of {judge.pool.table.source} are near-duplicates of labelled rows; there is nothing to label."
        )
    rows = judge.rows(chosen, answers)
    if uncertainty is not None:
        rows = [{**row, "uncertainty": round(float(uncertainty[at]), 4)} for row, at in zip(rows, chosen)]
    if len(chosen) < count:
        judge.notes.append(
            f"{len(chosen):,} {'rows are' if len(chosen) > 1 else 'row is'} chosen, not {count:,}: "
            + (
                "the pool has no others."
                if len(chosen) == len(features)
                else "all others are near-duplicates of these or of labelled rows."
            )
        )
    return judge.found(rows, overlap)


def label_suggest(
    pool: Any, *, run: str | Path | None = None, model: str | Path | None = None, train: Any = None,
    task: str | None = None, settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Suggest labels for all rows of an unlabelled pool: `graftkit label suggest` in Python.

    The arguments and the result are those of `label_next`; the least certain rows come first. Raises `UserError` as that does,
    and without a run or labelled rows.
    """
    judge = _judge(run, model, train, task, settings, "label suggest")
    if run is None and train is None:
        raise UserError(
            "`graftkit label suggest` learns labels from a run or from labelled rows: give --run RUN, or --train FILE."
        )
    overlap = judge.read(pool)
    answers = judge.answers()
    assert answers is not None
    uncertainty = uncertainty_of(answers)
    order = np.arange(len(answers)) if uncertainty is None else np.argsort(-uncertainty, kind="stable")
    return judge.found(judge.rows(order.tolist(), answers), overlap)


def _judge(run: Any, model: Any, train: Any, task: Any, settings: Any, command: str) -> _Judge:
    if run is not None:
        if train is not None or task is not None or settings:
            raise UserError(
                "a run has its own training rows, task and settings: give --run alone, or --model with --train."
            )
        return _OfRun(Path(run), None if model is None else str(model), command)
    if model is None:
        raise UserError("name a finished run (--run RUN), or a model (--model MODEL).")
    values, tables = recipes.gather(
        None, {"train": train, "eval": None}, {"model": model, "task": task}, settings
    )
    return _OfModel(values, tables, train is not None, command)


class _Judge:
    """What knows labelled rows, features and answers."""

    task: Task
    columns: dict[str, str]  # of the labelled rows; empty without them
    labels: tuple[str, ...] = ()
    train: Examples | None = None  # the labelled rows
    seed = 0

    def __init__(self) -> None:
        self.notes: list[str] = []

    def load(self) -> Reading:
        """Load what features come from."""
        raise NotImplementedError

    def answers(self) -> Answers | None:
        """Return the answers to the rows of the pool; None if no labels are known."""
        raise NotImplementedError

    def told(self) -> tuple[Answers | None, np.ndarray | None]:
        """Return the answers, and how unsure they are, (rows,)."""
        answers = self.answers()
        return answers, uncertainty_of(answers) if answers else None

    @cached_property
    def base(self) -> Reading:
        return self.load()

    @cached_property
    def pool_features(self) -> np.ndarray:
        return self._features(self.pool)

    @cached_property
    def labelled_features(self) -> np.ndarray | None:
        return None if self.train is None else self._features(self.train)

    def _features(self, examples: Examples) -> np.ndarray:
        dataset = _whole(self.base.dataset(replace(examples, targets=None)), examples)
        return by_example(features_of(self.base.forward, dataset).values, dataset)

    def read(self, pool: Any, once: bool = False) -> list[dict[str, Any]]:
        """Read the rows of the pool that are not labelled yet; return those that are, which are left out. `once`: rows that
        repeat an earlier one of the pool are left out too."""
        task, reading = self.task, self.reading
        table = task.read(pool, reading, "pool")
        if self.columns:
            self.columns_here = find_again(table, task.columns, self.columns, leave_out=task.labelled)
        else:
            wanted = tuple(column for column in task.columns if column.name not in task.labelled)
            named = {name: column for name, column in reading.columns.items() if name not in task.labelled}
            self.columns_here = task.used(find_columns(table, wanted, named), named, table)
            _refuse_labels(table, task, self.columns_here, named)
        examples = task.examples(table, self.columns_here, self.labels, reading.skip_bad, targets=False)
        known = {} if self.train is None else {key: i for i, key in enumerate(inputs_of(task, self.train))}
        overlap: list[dict[str, Any]] = []
        self.numbers: list[int] = []  # of the rows that are left, among all of the pool
        seen: set[bytes] = set()
        for row, key in enumerate(inputs_of(task, examples)):
            at = known.get(key)
            if at is None:
                if key not in seen:
                    self.numbers.append(row)
                seen |= {key} if once else set()
            else:
                assert self.train is not None
                overlap.append({"row": row, "where": examples.where(row), "train": self.train.where(at)})
        if overlap:
            which = f"{listing([one['where'] for one in overlap], SHOWN)}"
            if not self.numbers:
                raise UserError(
                    f"all rows of {table.source} are among the labelled rows ({which}); name a pool of other rows."
                )
            rows = "rows of the pool are" if len(overlap) > 1 else "row of the pool is"
            self.notes.append(f"{len(overlap):,} {rows} among the labelled rows and left out: {which}.")
        repeated = len(examples) - len(overlap) - len(self.numbers)
        if repeated:
            rows = (
                "rows of the pool repeat an earlier one and are"
                if repeated > 1
                else "row of the pool repeats an earlier one and is"
            )
            self.notes.append(f"{repeated:,} {rows} left out.")
        self.pool = examples.take(self.numbers)
        return overlap

    @property
    def reading(self) -> Any:
        raise NotImplementedError

    def rows(self, chosen: Sequence[int], answers: Answers | None) -> list[dict[str, Any]]:
        """Return what is told of some rows."""
        return [
            {
                "row": self.numbers[row], **file_of(self.pool, row),
                **self.task.asked(self.pool, row), **(answers[row] if answers else {}),
            }
            for row in chosen
        ]  # fmt: skip

    def found(self, rows: list[dict[str, Any]], overlap: list[dict[str, Any]]) -> dict[str, Any]:
        answer = self.task.labelled[0]
        columns, asked = self.columns_here, list(self.task.asked(self.pool, 0))
        if set(asked) != set(columns) and len(asked) == len(columns):  # called otherwise in answers
            columns = dict(zip(asked, columns.values()))
        return {
            "rows": rows, "overlap": overlap, "columns": columns, "label": self.columns.get(answer, answer), "notes": self.notes,
        }  # fmt: skip


class _OfRun(_Judge):
    """A finished run: its answers, and the features of its model without the graft, in which rows with the same answer are
    still told apart."""

    def __init__(self, folder: Path, model: str | None, command: str) -> None:
        super().__init__()
        self.run = open_run(folder, None, model)
        self.task, self.labels, self.columns = self.run.task, self.run.labels, self.run.columns
        self.seed = self.run.recipe.seed
        _refuse(self.task, command)
        self.train = self._labelled()

    @property
    def reading(self) -> Any:
        return reading_of(self.run.recipe)

    def _labelled(self) -> Examples | None:
        """Return the training rows of the run, if they can still be read."""
        source = self.run.recipe.data.train
        with suppress(UserError):
            if source != IN_MEMORY:
                table = self.task.read(source, self.reading, "train")
                columns = find_again(table, self.task.columns, self.columns, leave_out=self.task.labelled)
                return self.task.examples(table, columns, self.labels, True, targets=False)
        self.notes.append(
            "the training rows of the run cannot be read, so rows of the pool that are like them are not left out."
        )
        return None

    def load(self) -> Reading:
        return bare_backbone(self.run.recipe, self.task, source_of(self.run.recipe))

    def answers(self) -> Answers | None:
        task, outcomes, dataset = self._outcomes()
        return task.answers(outcomes, dataset, self.labels)

    def told(self) -> tuple[Answers | None, np.ndarray | None]:
        task, outcomes, dataset = self._outcomes()
        answers, unsure = (
            task.answers(outcomes, dataset, self.labels),
            task.unsure(outcomes, dataset, self.labels),
        )
        return answers, uncertainty_of(answers) if unsure is None else unsure

    def _outcomes(self) -> tuple[Task, Sequence[Any], Any]:
        loaded = load_run(self.run)
        dataset = _whole(self.task.dataset(self.pool, loaded.backbone, loaded.max_length), self.pool)
        temperature = Sure(self.run.folder, self.run.about, self.task).temperature
        forward, task = Scaled(loaded.forward, temperature), self.task.scaled(temperature)
        return task, run_predict(dataset, forward, task, BATCH), dataset


class _OfModel(_Judge):
    """A frozen model: its features, and the answers of a probe that is fitted to the labelled rows, if there are any."""

    def __init__(
        self, values: Mapping[str, Any], tables: Mapping[str, Any], has_train: bool, command: str
    ) -> None:
        super().__init__()
        data = dict(values.get("data", {}))
        self.recipe = recipes.make({**values, "data": data if has_train else {**data, "train": IN_MEMORY}})
        self.task, self.columns, self.seed = make_task(self.recipe.task), {}, self.recipe.seed
        _refuse(self.task, command)
        self.source = find_source(self.recipe.model, self.recipe.weights, self.recipe.quantize)
        self.prepared = None
        if has_train:
            self.prepared = prepare_rows(self.recipe, tables.get("train"))
            self.task, self.labels = self.prepared.task, self.prepared.labels
            self.columns, self.train = self.prepared.columns, self.prepared.train
            if self.task.one_answer:
                self.targets = targets_of(self.train.targets, self.labels)
            else:
                self.notes.append(
                    "a model alone does not tell which of these rows are uncertain; a finished run does (--run)."
                )

    @property
    def reading(self) -> Any:
        return reading_of(self.recipe)

    def load(self) -> Reading:
        if self.prepared is None:
            return bare_backbone(self.recipe, self.task, self.source)
        return frozen_backbone(self.recipe, self.prepared, self.source)

    def answers(self) -> Answers | None:
        if self.labelled_features is None or not self.task.one_answer:
            return None
        predict = fit_probe(self.labelled_features, self.targets)
        return self.targets.answers(predict(self.pool_features), self.labels)


def _refuse(task: Task, command: str) -> None:
    """Raise `UserError` for a task whose rows cannot be chosen or labelled by what a model says of them."""
    if not (command == "label next" and task.head and task.calibrates == WORDS):
        refuse_several_answers(task, command)


def _refuse_labels(table: Table, task: Task, columns: Mapping[str, str], named: Mapping[str, str]) -> None:
    """Raise `UserError` if a column that was found by its type alone is one of labels, by its name."""
    labels = {
        name.casefold() for column in task.columns if column.name in task.labelled for name in (column.name, *column.aliases)
    }  # fmt: skip
    for name, column in columns.items():
        if column.casefold() in labels and name not in named:
            raise UserError(
                f"{table.source} has no column for the {name}: {column!r} is a column of labels by its name (columns: "
                f"{listing(table.columns)}). Name another with data.columns={{{name}: ...}}."
            )


def _whole(dataset: Any, examples: Examples) -> Any:
    """Return a dataset. Raises `UserError` if it left out rows that the model cannot read."""
    if len(dataset.examples) != len(examples):
        raise UserError(f"{dataset.examples.skipped[0]} Fix the row, or leave it out of the file.")
    return dataset
