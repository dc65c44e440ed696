"""The spine: one readable function for each command."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graftkit import recipe as recipes
from graftkit.engine import checkpoint
from graftkit.engine.frozen import make_forward
from graftkit.engine.loop import Loop, Step, predict
from graftkit.engine.parallel import processes
from graftkit.errors import Interrupted, UserError
from graftkit.files import read_json, remove_leftovers, write_json, write_text
from graftkit.plan import Plan
from graftkit.prepare import Prepared, prepare, prepare_rows
from graftkit.recipe import IN_MEMORY, Recipe
from graftkit.report.card import model_card
from graftkit.report.console import Console
from graftkit.report.summary import show_end, show_found, show_plan
from graftkit.tasks.base import Dataset

CHECKPOINT_SECONDS = 120.0
RECIPE, PLAN, METRICS, RESULT, GRAFT, CHECKPOINTS = (
    "recipe.yaml",
    "plan.json",
    "metrics.jsonl",
    "result.json",
    "graft",
    "checkpoints",
)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what came out."""

    path: Path
    result: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """Of the test rows where there are any, else of the evaluation rows."""
        return self.result["metrics"]

    def predict(self, texts: Any) -> list[dict[str, Any]]:
        from graftkit.use import predict as run_predict

        return run_predict(self.path, texts)

    def evaluate(self, data: Any) -> dict[str, Any]:
        from graftkit.use import evaluate as run_evaluate

        return run_evaluate(self.path, data)["metrics"]

    def export(self, to: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
        from graftkit.export import export as run_export

        return run_export(self.path, Path(to), overwrite=overwrite)


def tune(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    model: str | None = None,
    task: str | None = None,
    train: Any = None,
    eval: Any = None,
    test: Any = None,
    method: Any = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> Run:
    """Fine-tune and return the run: the Python face of `graftkit tune`.

    `recipe` is a recipe, nested values or a YAML file; the other arguments are put over it. `train`, `eval`
    and `test` may be paths, or tables in memory (list of dicts, dict of lists, `datasets.Dataset`, data frame);
    `settings` holds dotted keys such as `{"train.epochs": 3}`. Raises `UserError` for a mistake in any of them.
    """
    values, tables = _gather(recipe, model, task, train, eval, test, method, out, settings)
    return run_recipe(recipes.make(values), Console(quiet=quiet), tables=tables, overwrite=overwrite)


def _gather(recipe: Any, model: Any, task: Any, train: Any, evaluation: Any, test: Any, method: Any, out: Any,
            settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    if isinstance(recipe, Recipe):
        values: dict[str, Any] = recipe.model_dump()
    elif isinstance(recipe, str | Path):
        values = recipes.read(Path(recipe))
    else:
        values = dict(recipe or {})
    tables: dict[str, Any] = {}
    for name, given in (("train", train), ("eval", evaluation), ("test", test)):
        if given is None:
            continue
        if not isinstance(given, str | Path | float):
            tables[name] = given
            given = IN_MEMORY
        recipes.place(values, f"data.{name}", str(given) if isinstance(given, Path) else given)
    for name, given in (("model", model), ("task", task), ("method", method), ("out", out)):
        if given is not None:
            recipes.place(values, name, str(given))
    for key, value in (settings or {}).items():
        recipes.place(values, key, value)
    return values, tables


def run_recipe(
    recipe: Recipe, console: Console, *, tables: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Run:
    """Train what a recipe says, from the start, into its run folder."""
    folder = _run_folder(recipe, overwrite)
    tables = tables or {}
    rows = prepare_rows(recipe, tables.get("train"), tables.get("eval"), tables.get("test"))
    prepared = prepare(recipe, rows)
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    resolved = _resolved(recipe, prepared, folder)
    if processes()[0] == 0:
        write_text(folder / RECIPE, resolved.dump())
        write_json(folder / PLAN, prepared.plan.as_dict())
    return _train(replace(prepared, recipe=resolved), folder, console, resumed=False)


def resume(
    folder: Path, console: Console, *, tables: Mapping[str, Any] | None = None
) -> Run:
    """Go on with an unfinished run to the same end as if it had never stopped."""
    if not (folder / RECIPE).is_file():
        raise UserError(f"{str(folder)!r} is not a run folder (it has no {RECIPE}).")
    recipe = recipes.make(recipes.read(folder / RECIPE), str(folder / RECIPE))
    if (folder / RESULT).is_file():
        console.line(f"{folder} is finished already; this is its result.")
        return Run(folder, read_json(folder / RESULT))
    tables = tables or {}
    if recipe.data.train == IN_MEMORY and "train" not in tables:
        raise UserError(f"{folder} was trained on rows in memory; resume it from Python with the same rows.")
    remove_leftovers(folder)
    rows = prepare_rows(recipe, tables.get("train"), tables.get("eval"), tables.get("test"))
    return _train(prepare(recipe, rows), folder, console, resumed=True)


def plan(recipe: Recipe, console: Console) -> Plan:
    """What `tune` would print before its first step; no weights are read and nothing is trained."""
    rows = prepare_rows(recipe)
    prepared = prepare(recipe, rows, meta=True)
    show_found(console, prepared)
    show_plan(console, prepared.plan)
    return prepared.plan


def _train(prepared: Prepared, folder: Path, console: Console, *, resumed: bool) -> Run:
    """The run itself: steps, and around them logging, evaluation and checkpoints."""
    train, rows = prepared.recipe.train, prepared.rows
    datasets = _encode(prepared)
    show_found(console, prepared, datasets)
    show_plan(console, prepared.plan)
    passes = round(prepared.settings.steps / prepared.plan.steps_per_epoch + 0.5)
    start = time.monotonic()
    forward = make_forward(
        prepared.graft, prepared.device, prepared.precision, prepared.depth, datasets["train"], passes
    )
    loop = Loop(
        prepared.graft, datasets["train"], forward, prepared.depth, rows.task, len(rows.labels), prepared.settings
    )
    watch = _Watch(prepared, datasets, folder, loop, start)
    if resumed:
        watch.restore(console)
    console.heading("Training")
    console.start(prepared.settings.steps, loop.step)
    smooth = _Smooth()
    try:
        with _stop_signals() as stopped:
            for step in loop if not watch.ended else ():
                smooth.add(step)
                watch.log(step)
                console.step(step.number, prepared.settings.steps, step.epoch, smooth.loss, smooth.accuracy, step.rows)
                if _due(train.evaluate_every, step, loop.per_epoch, prepared.settings.steps):
                    watch.evaluate(step, console)
                watch.maybe_checkpoint(train.checkpoint_every, force=bool(stopped))
                if stopped:
                    raise Interrupted(
                        f"stopped after step {step.number}; the checkpoint is written. "
                        f"Go on with: graftkit tune --resume {folder}"
                    )
                if watch.ended:
                    break
    finally:
        console.stop()
        watch.flush()
    return watch.finish(console)


def _encode(prepared: Prepared) -> dict[str, Dataset]:
    rows = prepared.rows
    parts = {"train": rows.train, "eval": rows.eval, "test": rows.test}
    return {
        name: rows.task.dataset(examples, prepared.backbone, prepared.max_length)
        for name, examples in parts.items()
        if examples is not None
    }


def _due(every: int | str, step: Step, per_epoch: int, total: int) -> bool:
    if step.number == total:
        return True
    if every == "end":
        return False
    return step.number % (per_epoch if every == "epoch" else int(every)) == 0


class _Smooth:
    """Running means for the progress line."""

    def __init__(self) -> None:
        self.loss = self.accuracy = self.weight = 0.0

    def add(self, step: Step) -> None:
        self.weight = 0.98 * self.weight + 0.02
        share = 0.02 / self.weight
        self.loss += share * (step.loss - self.loss)
        self.accuracy += share * (step.correct / step.rows - self.accuracy)


class _Watch:
    """What happens around the loop of one run, and the part of its state that is not the loop's."""

    def __init__(self, prepared: Prepared, datasets: dict[str, Dataset], folder: Path, loop: Loop, start: float) -> None:
        self.prepared, self.datasets, self.folder, self.loop = prepared, datasets, folder, loop
        self.start = start
        self.seconds_before = 0.0
        self.last_checkpoint = time.monotonic()
        self.best: dict[str, Any] | None = None
        self.waited = 0
        self.pending: list[dict[str, Any]] = []
        self.main = processes()[0] == 0
        evaluations = 1 if prepared.recipe.train.evaluate_every == "end" else 2
        self.forwards = {
            name: make_forward(
                prepared.graft, prepared.device, prepared.precision, prepared.depth, dataset,
                evaluations if name == "eval" else 1,
            )
            for name, dataset in datasets.items() if name != "train"
        }  # fmt: skip

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.start

    @property
    def ended(self) -> bool:
        patience = self.prepared.recipe.train.early_stopping
        return patience is not None and self.waited >= patience

    def log(self, step: Step) -> None:
        self.pending.append({
            "kind": "step", "step": step.number, "epoch": round(step.epoch, 4), "loss": step.loss,
            "accuracy": step.correct / step.rows, "gradient_norm": step.gradient_norm,
            "lr_factor": step.lr_factor, "rows": step.rows, "tokens": step.tokens, "seconds": round(self.seconds, 3),
        })  # fmt: skip

    def flush(self) -> None:
        if self.main and self.pending:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.pending)
        self.pending = []

    def metrics(self, name: str) -> dict[str, Any]:
        dataset = self.datasets[name]
        logits = predict(self.prepared.graft, dataset, self.forwards[name], 2 * self.prepared.settings.batch_size)
        rows = self.prepared.rows
        assert dataset.examples.targets is not None
        return rows.task.metrics(logits, dataset.examples.targets, rows.labels)

    def evaluate(self, step: Step, console: Console) -> None:
        """Metrics of the evaluation rows; the best weights so far are kept in a file of their own."""
        if "eval" not in self.datasets:
            return
        metrics = self.metrics("eval")
        self.pending.append({"kind": "evaluation", "step": step.number, **metrics})
        better = self.best is None or (metrics["accuracy"], -metrics["loss"]) > (self.best["accuracy"], -self.best["loss"])
        if better:
            self.best, self.waited = {"step": step.number, **metrics}, 0
            if self.main:
                checkpoint.save_best(self.folder / CHECKPOINTS, self.loop.parameters)
        else:
            self.waited += 1
        console.line(
            f"step {step.number}: evaluation accuracy {metrics['accuracy']:.4f}, macro F1 {metrics['macro_f1']:.4f}, "
            f"loss {metrics['loss']:.4f}{' (best so far)' if better else ''}"
        )
        self.checkpoint()

    def maybe_checkpoint(self, every: int | None, force: bool) -> None:
        due = self.loop.step % every == 0 if every else time.monotonic() - self.last_checkpoint > CHECKPOINT_SECONDS
        if due or force:
            self.checkpoint()

    def checkpoint(self) -> None:
        self.flush()
        if self.main:
            position = {"best": self.best, "waited": self.waited, "seconds": self.seconds}
            self.loop.save(self.folder / CHECKPOINTS, position)
        self.last_checkpoint = time.monotonic()

    def restore(self, console: Console) -> None:
        position = self.loop.restore(self.folder / CHECKPOINTS)
        step = position["step"] if position is not None else 0
        if position is not None:
            self.best, self.waited = position["best"], position["waited"]
            self.seconds_before = position["seconds"]
        console.line(f"resumed at step {step} of {self.prepared.settings.steps}")
        path = self.folder / METRICS
        if path.is_file():  # lines after the checkpoint will be written again
            lines = path.read_text(encoding="utf-8").splitlines()
            write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))

    def finish(self, console: Console) -> Run:
        prepared, folder = self.prepared, self.folder
        if self.best is not None:
            checkpoint.load_best(folder / CHECKPOINTS, self.loop.parameters)
        seconds = self.seconds
        found = {"eval": {k: v for k, v in self.best.items() if k != "step"}} if self.best else {}
        if "test" in self.datasets:
            found["test"] = self.metrics("test")
        result = {
            "run": str(folder),
            "metrics": found.get("test") or found.get("eval") or {},
            "evaluation": self.best,
            "trained_parameters": prepared.plan.trained_parameters,
            "total_parameters": prepared.plan.total_parameters,
            "seconds": round(seconds, 2),
            "peak_memory_bytes": peak_memory(prepared.device),
            "steps": self.loop.step,
            "precision": prepared.precision,
            "device": str(prepared.device),
            "method": str(prepared.graft.method),
        }
        if self.main:
            rows = prepared.rows
            prepared.graft.save(
                folder / GRAFT, task=str(rows.task), labels=list(rows.labels), columns=rows.columns,
                max_length=prepared.max_length, precision=prepared.precision,
            )  # fmt: skip
            for name, metrics in found.items():
                self.pending.append({"kind": "final", "data": name, "step": self.loop.step, **metrics})
            self.flush()
            write_text(folder / "README.md", model_card(prepared, result, found))
            write_json(folder / RESULT, result)
            for path in checkpoint.existing(folder / CHECKPOINTS):
                path.unlink()
        show_end(console, prepared, result, found)
        return Run(folder, result)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut short when the process was killed


def _run_folder(recipe: Recipe, overwrite: bool) -> Path:
    """Where the run goes. Raises `UserError` where a run is there already."""
    if recipe.out is None:
        name = "-".join([recipe.task.partition("(")[0], time.strftime("%Y%m%d-%H%M%S")])
        return Path("runs", name).absolute()
    folder = Path(recipe.out).expanduser().absolute()
    if folder.is_file():
        raise UserError(f"run folder {recipe.out!r} is a file; name a folder with --out.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / RECIPE).is_file():
            raise UserError(f"folder {recipe.out!r} holds files that are not a run's; name another with --out.")
        if not overwrite:
            raise UserError(
                f"run folder {recipe.out!r} exists. Go on with it by `graftkit tune --resume {recipe.out}`, "
                "replace it with --overwrite, or name another with --out."
            )
    return folder


def _resolved(recipe: Recipe, prepared: Prepared, folder: Path) -> Recipe:
    """The recipe with what was chosen filled in and with absolute paths, so that it runs again anywhere."""

    def absolute(path: Any) -> Any:
        return str(Path(path).expanduser().absolute()) if isinstance(path, str) and path != IN_MEMORY else path

    data = recipe.data.model_copy(update={
        "train": absolute(recipe.data.train), "eval": absolute(recipe.data.eval), "test": absolute(recipe.data.test),
        "columns": prepared.rows.columns,
    })  # fmt: skip
    train = recipe.train.model_copy(update={"precision": prepared.precision})
    model = absolute(recipe.model) if Path(recipe.model).expanduser().is_dir() else recipe.model
    return recipe.model_copy(update={
        "model": model, "data": data, "train": train, "method": str(prepared.graft.method), "out": str(folder),
    })  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """Largest memory of the device, or of this process on a CPU, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of being interrupted within a step; a second one interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__: Sequence[str] = ["Run", "plan", "resume", "run_recipe", "tune"]

