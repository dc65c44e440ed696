"""One readable function for each training command: tune, resume and plan."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from graftkit.claims import remove_leftovers
from graftkit.engine.loop import Loop
from graftkit.engine.parallel import in_first, processes, sum_numbers
from graftkit.engine.tracking import refuse_missing
from graftkit.errors import Interrupted, UserError
from graftkit.files import write_json, write_text
from graftkit.plan.elsewhere import Machine
from graftkit.plan.parameters import Plan
from graftkit.recipe import schema as recipes
from graftkit.recipe.environment import are_several, forecasts
from graftkit.recipe.schema import IN_MEMORY, Recipe
from graftkit.report.console import Console
from graftkit.report.finished import not_a_run
from graftkit.report.summary import show_found, show_plan, show_rendered
from graftkit.runs import folder as run_folder
from graftkit.runs.budget import budgeted
from graftkit.runs.finding import with_found_lr
from graftkit.runs.folder import LR_FIND, METRICS, PLAN, RECIPE, RESULT, go_on, how_to_resume
from graftkit.runs.foresight import Reality, encoded, foresee_without_weights, told
from graftkit.runs.forwards import training_forward
from graftkit.runs.garbage import uncollected
from graftkit.runs.inputs import check_inputs, inputs
from graftkit.runs.monitor import Watch
from graftkit.runs.pace import Pace
from graftkit.runs.prepare import Prepared, Rows, prepare, prepare_rows, rehearse, source_of
from graftkit.runs.progress import Smooth, due, stop_signals
from graftkit.runs.reporting import found_in, show_cached
from graftkit.runs.saved import log_lines, read_plan, read_result
from graftkit.runs.starting import part_of, put_in_place, started
from graftkit.tasks.base import Dataset


@dataclass(frozen=True)
class Run:
    """A finished run.

    `path` is its folder and `result` the content of its `result.json`.
    """

    path: Path
    result: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics on the test rows if there are any, otherwise on the evaluation rows."""
        return self.result["metrics"]

    def predict(
        self, texts: Any, options: Mapping[str, Any] | None = None, *, out: str | Path | None = None,
        overwrite: bool = False, coverage: float | None = None,
    ) -> Any:  # fmt: skip
        """Predict for texts, a file or a table. With `out`, write the answers to that file and return counts. `coverage`:
        add the set of labels that holds the right one with this probability."""
        from graftkit.runs.predict import predict as run_predict
        from graftkit.runs.predict import predict_into

        if out is not None:
            return predict_into(self.path, texts, out, options, overwrite=overwrite, coverage=coverage)
        return run_predict(self.path, texts, options, coverage=coverage)

    def predict_rows(self, data: Any, options: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the answers one by one while reading a file of any size."""
        from graftkit.runs.predict import stream

        return iter(stream(self.path, data, options))

    def evaluate(self, data: Any, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the metrics on labelled rows."""
        from graftkit.runs.predict import evaluate as run_evaluate

        return run_evaluate(self.path, data, options)["metrics"]

    def explain(
        self, texts: Any, *, rows: Sequence[int] | None = None, method: str | None = None, steps: int = 50,
        label: str | None = None, word: str | None = None, nearest: int = 3, html: str | Path | None = None,
        overlay: str | Path | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Return which parts of an input each answer comes from: `graftkit.explain` with this run."""
        from graftkit.runs.explain import explain as run_explain

        return run_explain(
            self.path, texts, rows=rows, method=method, steps=steps, label=label, word=word, nearest=nearest, html=html,
            overlay=overlay,
        )  # fmt: skip

    def calibrate(self, data: Any, *, known: float = 0.95) -> dict[str, Any]:
        """Fit probabilities, sets of labels and what the run does not know on labelled rows that it was not trained on."""
        from graftkit.runs.calibrate import calibrate as run_calibrate

        return run_calibrate(self.path, data, known=known)

    def export(self, to: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Write the run as a plain model into the folder `to`, compared with the run on real rows."""
        from graftkit.runs.export import export as run_export

        return run_export(self.path, Path(to), overwrite=overwrite)


def tune(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    model: str | None = None,
    weights: str | Path | None = None,
    task: str | None = None,
    train: Any = None,
    eval: Any = ...,
    test: Any = None,
    method: Any = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> Run:
    """Fine-tune a model and return the run: `graftkit tune` in Python.

    `recipe` is a recipe, nested values or a YAML file; the other arguments override it. `weights` is a safetensors
    file for a `model` of the form `package.module:function`. `train`, `eval` and `test` may be paths, or tables in
    memory (list of dicts, dict of lists, `datasets.Dataset`, data frame). With `eval=None`, all rows are trained on;
    if it is omitted, the recipe decides, and by default a tenth is held out. `settings` holds dotted keys such as
    `{"train.epochs": 3}`. Raises `UserError` for a mistake in any of them.
    """
    given = {"train": train, "eval": eval, "test": test}
    named = {"model": model, "weights": weights, "task": task, "method": method, "out": out}
    values, tables = recipes.gather(recipe, given, named, settings)
    return run_recipe(recipes.make(values), Console(quiet=quiet), tables=tables, overwrite=overwrite)


def run_recipe(
    recipe: Recipe, console: Console, *, tables: Mapping[str, Any] | None = None, overwrite: bool = False,
    rows: Rows | None = None,
) -> Run:  # fmt: skip
    """Train a recipe from the start into its run folder. `rows`: its rows, where they are known and the recipe is rehearsed.

    Under `torchrun` or `accelerate launch`, all processes train together: one step accumulates
    `train.accumulate` batches in each process.
    """
    if (
        recipe.out is None and are_several()
    ):  # before they connect: if one ends first, the others would fail at that
        raise UserError("several processes need a run folder in advance: name it with --out.")
    console.quiet_unless(processes()[0] == 0)
    tables = tables or {}
    refuse_missing(recipe.train.trackers)
    with ExitStack() as stack:
        claimed = in_first(lambda: stack.enter_context(run_folder.claimed(recipe, overwrite)))
        folder = claimed or run_folder.named(str(recipe.out))
        rehearsed = rows is not None
        with uncollected():
            rows = rows or prepare_rows(recipe, tables.get("train"), tables.get("eval"), tables.get("test"))
        recipe = budgeted(recipe, rows, console)
        recipe = stack.enter_context(started(recipe, rows, folder))
        source = source_of(recipe)
        if not rehearsed:
            with uncollected():  # imports the code of the model
                rehearse(recipe, rows, source)
        prepared = prepare(recipe, rows, source)
        prepared, datasets = encoded(prepared)
        prepared, curve = with_found_lr(prepared, console)
        recipe = recipe.model_copy(update={"train": prepared.recipe.train})
        if processes()[0] == 0 and overwrite:
            run_folder.clear(folder, keep=part_of(recipe, folder))
        recipe = put_in_place(recipe, folder)
        prepared.backbone.source = recipe.model
        prepared = replace(prepared, recipe=_resolved(recipe, prepared, folder))
        if processes()[0] == 0:
            write_text(folder / RECIPE, prepared.recipe.dump())
            write_json(folder / PLAN, _planned(prepared, datasets))
            if curve is not None:
                write_json(folder / LR_FIND, curve)
        return _train(prepared, datasets, folder, console, resumed=False)


def resume(
    folder: str | Path,
    *,
    train: Any = None,
    eval: Any = None,
    test: Any = None,
    force: bool = False,
    quiet: bool = True,
) -> Run:
    """Resume an unfinished run: `graftkit tune --resume` in Python.

    The result is the same as if the run had never stopped. If its rows were in memory, pass them again as `train`,
    `eval` and `test`. `force`: accept a recipe, rows or a model that have changed since; the result then lists the
    changes.
    """
    given = {"train": train, "eval": eval, "test": test}
    tables = {name: table for name, table in given.items() if table is not None}
    return resume_run(Path(folder), Console(quiet=quiet), tables=tables, force=force)


def resume_run(
    folder: Path, console: Console, *, tables: Mapping[str, Any] | None = None, force: bool = False,
    rows: Rows | None = None,
) -> Run:  # fmt: skip
    """Resume an unfinished run. Raises `UserError` if its inputs are not those that it started with, unless `force`."""
    console.quiet_unless(processes()[0] == 0)
    folder = folder.expanduser().absolute()
    if folder.name == RECIPE and folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"run folder {str(folder)!r} does not exist.")
    if not (folder / RECIPE).is_file():
        raise not_a_run(folder)
    recipe = recipes.make(recipes.read(folder / RECIPE), str(folder / RECIPE), stored=True)
    recipe = run_folder.at_home(recipe, folder)
    if (folder / RESULT).is_file():
        result = read_result(folder / RESULT)
        console.line(
            f"{folder} is already finished; its metrics are in {RESULT} and README.md there. {go_on(folder)}"
        )
        with suppress(UserError), run_folder.held(folder):
            if run_folder.tidy(folder):
                console.line("note: removed what was left there when the run was killed at its end.")
        return Run(folder, result)
    read_plan(folder / PLAN)  # raise if they are damaged, before anything is loaded
    log_lines(folder / METRICS)
    tables = tables or {}
    for name in ("train", "eval", "test"):
        if getattr(recipe.data, name) == IN_MEMORY and name not in tables:
            raise UserError(
                f"{folder}: the {name} rows were in memory. Resume with: {how_to_resume(recipe, folder)}."
            )
    with ExitStack() as stack:
        in_first(lambda: stack.enter_context(run_folder.held(folder)))
        rows = rows or prepare_rows(recipe, tables.get("train"), tables.get("eval"), tables.get("test"))
        prepared = prepare(recipe, rows)
        prepared, datasets = encoded(prepared)
        planned = _planned(prepared, datasets)
        planned, notes = check_inputs(folder, prepared, planned, force)
        for note in notes:
            console.line(note)
        if processes()[0] == 0:
            remove_leftovers(folder)
            write_json(folder / PLAN, planned)  # the run may have been killed before writing it
        return _train(prepared, datasets, folder, console, resumed=True)


def plan(recipe: Recipe, console: Console, machine: Machine | None = None) -> Plan:
    """Print what `tune` prints before its first step; no weights are read and nothing is trained.

    `machine`: another one, that the run is planned for.
    """
    refuse_missing(recipe.train.trackers)
    rows = prepare_rows(recipe)
    recipe = budgeted(recipe, rows, console)
    if machine is not None and recipe.train.precision == "auto":
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "bf16"})})
    with TemporaryDirectory() as place, started(recipe, rows, Path(place)) as recipe:
        prepared = prepare(recipe, rows, meta=True)
    prepared, datasets = encoded(prepared)
    show_found(console, found_in(prepared, datasets, statistics(prepared, {"train": datasets["train"]})))
    show_plan(console, prepared.plan.as_dict())
    found = replace(prepared.plan, warnings=[*prepared.plan.warnings, *prepared.warnings])
    if not forecasts() and machine is None:
        return found
    foreseen = foresee_without_weights(prepared, datasets, machine)
    return replace(found, forecast=told(foreseen, console))


def _train(prepared: Prepared, datasets: dict[str, Dataset], folder: Path, console: Console, *,
           resumed: bool) -> Run:  # fmt: skip
    """Train. Raises `Interrupted` on Ctrl-C at any moment."""
    try:
        return Run(folder, _steps(prepared, datasets, folder, console, resumed))
    except KeyboardInterrupt:
        raise Interrupted(f"stopped. Resume with: {how_to_resume(prepared.recipe, folder)}") from None


def _steps(prepared: Prepared, datasets: dict[str, Dataset], folder: Path, console: Console,
           resumed: bool) -> dict[str, Any]:  # fmt: skip
    """Run the steps with logging, evaluation and checkpoints, and return the result."""
    train, rows = prepared.recipe.train, prepared.rows
    show_found(console, found_in(prepared, datasets, statistics(prepared, datasets)))
    show_plan(console, prepared.plan.as_dict())
    reality = Reality(prepared, datasets, console)
    show_rendered(console, rows.task.rendered(datasets["train"]))
    start = time.monotonic()
    forward = training_forward(prepared, datasets["train"])
    loop = Loop(
        prepared.graft, datasets["train"], forward, prepared.phases, prepared.learn, prepared.settings
    )
    watch = Watch(prepared, datasets, folder, loop, start, reality)
    pace = Pace(prepared, loop, console)
    watch.regions = pace.regions
    if resumed:
        watch.restore(console)
    watch.go_further(console)
    watch.track(console)
    show_cached(console, watch.forwards)
    console.heading("Training" if prepared.settings.steps else "Evaluation")
    console.start(prepared.settings.steps, loop.step)
    smooth = Smooth()
    try:
        with stop_signals() as stopped:
            watch.mark = time.monotonic()
            for step in pace.steps() if not watch.ended else ():
                smooth.add(step)
                watch.log(step)
                watch.tell(step, console)
                watch.keep_before_decay()
                left = reality.left(step.number, watch.stepping)
                smooth.show(console, step, prepared.settings.steps, left)
                if due(train.evaluate_every, step, loop.per_epoch, prepared.settings.steps):
                    watch.evaluate(step.number, console)
                stop = _any_stops(bool(stopped), loop.world)
                watch.maybe_checkpoint(train.checkpoint_every, force=stop)
                if stop:
                    raise Interrupted(
                        f"stopped after step {step.number}; the checkpoint is written. "
                        f"Resume with: {how_to_resume(prepared.recipe, folder)}"
                    )
                if watch.ended:
                    break
                watch.mark = time.monotonic()
        if not prepared.settings.steps and watch.best is None:
            watch.evaluate(0, console)
    except BaseException:
        with suppress(UserError):
            watch.flush()
        watch.untrack()
        raise
    finally:
        console.stop()
        pace.regions.leave()
        with suppress(UserError):  # `finish` tries again; if the run stops, resuming writes these lines again
            watch.flush()
    return watch.finish(console)


def _any_stops(stop: bool, processes: int) -> bool:
    """Return whether any process was signalled: then all stop."""
    return sum_numbers([float(stop)])[0] > 0 if processes > 1 else stop


def _planned(prepared: Prepared, datasets: dict[str, Dataset]) -> dict[str, Any]:
    """Return the content of plan.json, with digests that detect changed rows when the run is resumed."""
    return {
        **prepared.plan.as_dict(),
        "statistics": statistics(prepared, datasets),
        "warnings": [*prepared.plan.warnings, *prepared.warnings],
        **inputs(prepared, datasets),
    }


def statistics(prepared: Prepared, datasets: Mapping[str, Dataset]) -> dict[str, Any]:
    """Return the statistics of each data split."""
    rows = prepared.rows
    return {name: rows.task.statistics(dataset, rows.labels) for name, dataset in datasets.items()}


def _resolved(recipe: Recipe, prepared: Prepared, folder: Path) -> Recipe:
    """Return the recipe with defaults resolved and absolute paths, so that it can be run from anywhere."""

    def absolute(path: Any) -> Any:
        return (
            str(Path(path).expanduser().absolute()) if isinstance(path, str) and path != IN_MEMORY else path
        )

    data = recipe.data.model_copy(update={
        "train": absolute(recipe.data.train), "eval": absolute(recipe.data.eval), "test": absolute(recipe.data.test),
        "probe": absolute(recipe.data.probe),
        "columns": prepared.rows.columns,
    })  # fmt: skip
    train = recipe.train.model_copy(
        update={"precision": prepared.plan.precision, "start": absolute(recipe.train.start)}
    )
    model = absolute(recipe.model) if Path(recipe.model).expanduser().is_dir() else recipe.model
    method = str(prepared.graft.method.without_outputs()) or None  # other data may have other labels
    return recipe.model_copy(update={
        "model": model, "weights": absolute(recipe.weights), "data": data, "train": train, "method": method,
        "out": str(folder),
    })  # fmt: skip
