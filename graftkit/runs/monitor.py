"""What happens around the loop of one run: its log, evaluations, checkpoints and end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftkit.data.by_tokens import prediction_sizes
from graftkit.engine import checkpoint
from graftkit.engine.forward import Forward
from graftkit.engine.loop import Loop, Step
from graftkit.engine.parallel import in_first, processes, wait
from graftkit.engine.predict import predict
from graftkit.engine.regions import Regions
from graftkit.engine.tracking import Trackers
from graftkit.errors import UserError, first_line, listing
from graftkit.files import append_lines, write_json, write_text
from graftkit.report.console import Console
from graftkit.report.making import write_report
from graftkit.report.summary import show_end, title
from graftkit.runs import folder as run_folder
from graftkit.runs.best import best_of
from graftkit.runs.confidence import Watching
from graftkit.runs.describing import describe, facts
from graftkit.runs.export import write_model
from graftkit.runs.folder import BEFORE_DECAY, CHECKPOINTS, GRAFT, METRICS, RESULT, how_to_resume
from graftkit.runs.foresight import Reality
from graftkit.runs.forwards import evaluation_forward
from graftkit.runs.prepare import Prepared
from graftkit.runs.probe import METRIC
from graftkit.runs.saved import log_lines, stays
from graftkit.runs.scores import SCORES, write_scores
from graftkit.tasks.base import Dataset

CHECKPOINT_SECONDS = 120.0
WORST_ROWS = 20  # examples that the model got most wrong, kept in the run folder


class Watch:
    """What happens around the loop of one run, and the part of its state that is not the loop's."""

    def __init__(
        self, prepared: Prepared, datasets: dict[str, Dataset], folder: Path, loop: Loop, start: float, reality: Reality
    ) -> None:  # fmt: skip
        self.prepared, self.datasets, self.folder, self.loop = prepared, datasets, folder, loop
        self.start, self.reality = start, reality
        self.seconds_before = 0.0
        self.tokens = 0  # trained on, without padding
        self.stepping = 0.0  # seconds spent in steps, without evaluations
        self.mark = time.monotonic()
        self.last_checkpoint = time.monotonic()
        self.best: dict[str, Any] | None = None
        self.waited = 0
        self.worst: list[dict[str, Any]] = []  # of the rows evaluated last
        self.best_worst: list[dict[str, Any]] = []  # of the evaluation rows, with the best weights
        self.unused: set[str] = set()  # trained parameters that do not affect the output
        self.zero: list[str] = []  # parameters whose gradient was zero throughout the first epoch
        self.pending: list[dict[str, Any] | tuple[Step, float]] = []  # lines, or a step and its seconds
        rows = prepared.rows
        self.choice = best_of(rows.task, rows.labels, prepared.recipe.train.best)
        self.watching = Watching(prepared, datasets)
        self.problems: list[str] = []  # failures that did not stop the run
        self.trackers: Trackers | None = None
        self.regions: Regions | None = None
        self.main = processes()[0] == 0
        self.forwards: dict[str, Forward] = {"train": loop.forward}
        if "eval" in datasets:
            self._forward("eval", 1 if prepared.recipe.train.evaluate_every == "end" else 2)

    def _forward(self, name: str, passes: int) -> Forward:
        """Return the forward pass of evaluation or test rows, made when it is needed first."""
        if name not in self.forwards:
            self.forwards[name] = evaluation_forward(self.prepared, self.datasets[name], passes)
        return self.forwards[name]

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.start

    @property
    def ended(self) -> bool:
        patience = self.prepared.recipe.train.early_stopping
        return patience is not None and self.waited >= patience

    def log(self, step: Step) -> None:
        self.tokens, self.stepping = self.tokens + step.tokens, self.stepping + time.monotonic() - self.mark
        self.pending.append((step, round(self.seconds, 3)))

    def tell(self, step: Step, console: Console) -> None:
        """Print the findings of the audit that are not errors."""
        for note in self.loop.recompute.notes():
            console.line(note)
        new = set(step.unused) - self.unused
        if new:
            self.unused |= new
            names = listing(sorted(new), 4)
            console.line(f"note: {len(new)} parameters do not affect the output and stay unchanged: {names}")
        if step.zero and not self.zero:
            self.zero = list(step.zero)
            console.line(
                f"note: the gradient of {len(step.zero)} parameters was zero throughout the first epoch: {listing(step.zero, 4)}"
            )

    @property
    def _cached(self) -> str | None:
        """The digest of the activations that the run trains on, if they are in memory."""
        return getattr(self.loop.forward.filled, "digest", None)

    def track(self, console: Console) -> None:
        """Start the trackers that the recipe names, in the first process only."""
        recipe = self.prepared.recipe
        if self.main and recipe.train.trackers:
            self.trackers = Trackers(
                recipe.train.trackers,
                self.folder,
                recipe.model_dump(),
                lambda text: self._tell_of(text, console),
            )

    def untrack(self) -> None:
        """Finish the trackers, which flushes their buffers."""
        if self.trackers is not None:
            self.trackers.finish()

    def _tell_of(self, problem: str, console: Console) -> None:
        self.problems.append(problem)
        console.line(f"warning: {problem}")

    def flush(self) -> None:
        """Write the pending lines. Raises `UserError` if that fails; they stay pending."""
        if self.main and self.pending:
            lines = [line for one in self.pending if (line := self._line(one)) is not None]
            append_lines(self.folder / METRICS, map(json.dumps, lines))
            if self.trackers is not None:
                self.trackers.log(lines)
        self.pending = []

    def _line(self, pending: dict[str, Any] | tuple[Step, float]) -> dict[str, Any] | None:
        """Return a line of the log; None for a step that was skipped, as one before it was not finite."""
        if isinstance(pending, dict):
            return pending
        step, seconds = pending
        if step.number > self.loop.step:
            return None
        right = {} if step.accuracy is None else {"accuracy": step.accuracy}
        return {
            "kind": "step", "step": step.number, "epoch": round(step.epoch, 4), "loss": step.loss, **right,
            "gradient_norm": step.gradient_norm, "lr_factor": step.lr_factor, "rows": step.rows, "tokens": step.tokens,
            "seconds": seconds,
        }  # fmt: skip

    def metrics(
        self, name: str, interesting: Callable[[dict[str, Any]], bool] = lambda metrics: True
    ) -> dict[str, Any]:
        """Return the metrics on a dataset, with intervals if the metrics without them are `interesting`."""
        rows, dataset = self.prepared.rows, self.datasets[name]
        sizes = prediction_sizes(self.prepared.recipe.train)
        forward = self.watching.recording(name, self._forward(name, 1))
        outcomes = predict(dataset, forward, rows.task, *sizes)
        self.worst = []
        metrics = rows.task.metrics(outcomes, dataset, rows.labels, intervals=False)
        if interesting(metrics):
            metrics = rows.task.metrics(outcomes, dataset, rows.labels)
            if self.main:
                with self._reporting(f"writing {SCORES}"):
                    write_scores(self.folder, rows.task, outcomes, dataset, rows.labels)
        with self._reporting(f"finding the worst {name} rows"):
            self.worst = rows.task.worst(outcomes, dataset, rows.labels, WORST_ROWS)
        return metrics

    def probed(self) -> dict[str, float]:
        """Return the accuracy of the probe, if the run has one."""
        prepared, probe = self.prepared, self.prepared.rows.probe
        if probe is None:
            return {}
        where = prepared.backbone, prepared.device, prepared.precision
        return {METRIC: probe.accuracy(probe.features(*where, prepared.max_length))}

    def evaluate(self, step: int, console: Console) -> None:
        """Evaluate on the evaluation rows, and save the weights if they are the best so far."""
        if "eval" not in self.datasets:
            return
        with self.loop.averaged():
            self._evaluate(step, console)
        self.checkpoint()

    def _evaluate(self, step: int, console: Console) -> None:
        metrics = self.metrics("eval", lambda found: self.choice.better(found, self.best)) | self.probed()
        self.pending.append({"kind": "evaluation", "step": step, **metrics})
        task = self.prepared.rows.task
        better = self.choice.better(metrics, self.best)
        if better:
            self.best, self.waited, self.best_worst = {"step": step, **metrics}, 0, self.worst
            self.watching.keep()
            if self.main:
                with self._telling_how_to_go_on():
                    checkpoint.save_best(self.folder / CHECKPOINTS, self.loop.graft.tensors)
        else:
            self.waited += 1
        names = dict.fromkeys(
            [name for name in (*task.headline, self.choice.figure, METRIC) if name in metrics] + ["loss"]
        )
        figures = ", ".join(f"{title(name)} {metrics[name]:.4f}" for name in names)
        console.line(f"step {step}: evaluation {figures}{' (best so far)' if better else ''}")

    def maybe_checkpoint(self, every: int | None, force: bool) -> None:
        due = (
            self.loop.step % every == 0
            if every
            else time.monotonic() - self.last_checkpoint > CHECKPOINT_SECONDS
        )
        if due or force:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write the pending lines and the state of this step. Raises `UserError` if the disk is full."""
        with self._telling_how_to_go_on():
            self.flush()
            if self.main:
                position = {
                    "best": self.best, "waited": self.waited, "seconds": self.seconds, "worst": self.best_worst,
                    "unused": sorted(self.unused), "zero": self.zero, "tokens": self.tokens, "stepping": self.stepping,
                    "cached": self._cached,
                    "compiled": None if self.regions is None else self.regions.state,
                }  # fmt: skip
                self.loop.save(self.folder / CHECKPOINTS, position)
        self.last_checkpoint = time.monotonic()

    def keep_before_decay(self) -> None:
        """Keep the state of the moment before the learning rate decays, which a longer run can go on from."""
        if self.loop.before_decay and self.main:
            with self._telling_how_to_go_on():
                self.loop.save(self.folder / BEFORE_DECAY, {})

    def go_further(self, console: Console) -> None:
        """Go on from the state before its decay of the run in train.from, unless this run has steps of its own."""
        further = self.prepared.further
        if further is None or self.loop.step:
            return
        _, damaged = self.loop.restore(further)
        wait()  # until all processes have read it
        for one in damaged:
            raise UserError(one.error)
        console.line(
            f"goes on from step {self.loop.step} of {further.parent}, before its decay, to {self.prepared.settings.steps}"
        )

    @contextmanager
    def _telling_how_to_go_on(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(
                f"{error} Resume the run from its last checkpoint with: "
                f"{how_to_resume(self.prepared.recipe, self.folder)}"
            ) from None

    def restore(self, console: Console) -> None:
        position, damaged = self.loop.restore(self.folder / CHECKPOINTS)
        wait()  # until all processes have read the checkpoints
        for one in damaged:
            console.line(f"note: {one.error} The run goes on from the checkpoint before.")
            if self.main:
                one.path.unlink(missing_ok=True)
        step = position["step"] if position is not None else 0
        if position is not None:
            self.best, self.waited = position["best"], position["waited"]
            self.seconds_before, self.best_worst = position["seconds"], position["worst"]
            self.unused, self.zero = set(position.get("unused", ())), position.get("zero", [])
            self.tokens, self.stepping = position.get("tokens", 0), position.get("stepping", 0.0)
            before, now = position.get("cached"), self._cached
            if before is not None and now is not None and before != now:
                console.line(
                    "note: the cache was emptied or changed since; outputs of frozen layers differ by rounding."
                )
            if self.regions is not None:
                self.regions.restore(position.get("compiled"))
        in_first(lambda: self._check_best(step))
        console.line(f"resumed at step {step} of {self.prepared.settings.steps}")
        path = self.folder / METRICS
        lines = log_lines(path)
        if self.main and lines:  # those after the checkpoint will be written again
            write_text(path, "".join(f"{line}\n" for line, value in lines if stays(value, step)))

    def _check_best(self, step: int) -> None:
        """Raise `UserError` if the best weights are damaged, unless they are those of this step."""
        folder = self.folder / CHECKPOINTS
        fault = checkpoint.best_fault(folder) if self.best is not None else None
        if fault is None or self.best is None:
            return
        if self.best["step"] != step:
            raise UserError(
                f"{fault} They are the best weights of the run so far. To train from the first step again, remove "
                f"{folder} and resume the run."
            )
        with self.loop.averaged():
            checkpoint.save_best(folder, self.loop.graft.tensors)

    def finish(self, console: Console) -> dict[str, Any]:
        """Restore the best weights, evaluate on the test rows, and write graft, card and result."""
        self.reality.end_of_steps()
        with self._telling_how_to_go_on():
            return self._finished(console)

    def _finished(self, console: Console) -> dict[str, Any]:
        prepared, folder = self.prepared, self.folder
        wait()  # until the best weights are written
        if self.loop.average is not None:
            self.loop.average.keep()
        if self.best is not None:
            checkpoint.load_best(folder / CHECKPOINTS, self.loop.graft.tensors)
        seconds = self.seconds
        found = {"eval": {k: v for k, v in self.best.items() if k != "step"}} if self.best else {}
        worst = self.best_worst
        task = prepared.rows.task.decided(found.get("eval"))
        self.prepared = prepared = replace(prepared, rows=replace(prepared.rows, task=task))
        if self.main:
            rows = prepared.rows
            prepared.graft.save(
                folder / GRAFT, task=str(rows.task), labels=list(rows.labels), columns=rows.columns,
                max_length=prepared.max_length, precision=prepared.precision,
            )  # fmt: skip
        with self._reporting("calibrating"):
            self.watching.fit(folder / GRAFT, self._forward, self.main)
        if "test" in self.datasets:
            with self._reporting("evaluating the test rows"):
                found["test"] = self.metrics("test")
                worst = self.worst
                self.watching.tested()
        result = self._result(found, seconds)
        if self.main:
            for name, metrics in found.items():
                self.pending.append({"kind": "final", "data": name, "step": self.loop.step, **metrics})
            self.flush()
            describe(prepared, self.datasets, folder, result, found, worst, self._reporting)
            if task.makes_model:
                with self._reporting("writing the plain model"):
                    result["model"] = str(write_model(folder, prepared.rows.train))
            result["problems"] = list(self.problems)
            write_json(folder / RESULT, result)  # last: with it, the run is finished
            run_folder.tidy(folder)
            with self._reporting("writing the report"):
                write_report(folder)
            self.untrack()
        wait()  # until the folder is complete
        with self._reporting("showing the result"):
            show_end(console, task.headline, result, found, worst)
        for problem in self.problems:
            console.line(f"warning: {problem}")
        if self.problems != result["problems"]:
            result["problems"] = list(self.problems)
            if self.main:
                with suppress(UserError):
                    write_json(folder / RESULT, result)
        return result

    def _result(self, found: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the content of result.json."""
        return {
            "run": str(self.folder),
            "metrics": found.get("test") or found.get("eval") or {},
            "evaluation": self.best,
            "trained_parameters": self.prepared.plan.trained_parameters
            - sum(self.prepared.graft.parameters[name].numel() for name in self.unused),
            "unused_parameters": sorted(self.unused),
            "zero_gradient_parameters": self.zero,
            "seconds": round(seconds, 2),
            **self.reality.compared(seconds, self.seconds_before > 0 or self.ended),
            "optimizer_bytes": self.loop.optimizer_bytes,
            "steps": self.loop.step,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self.stepping, 1) if self.stepping else None,
            "cache": {
                name: forward.filled.as_dict() for name, forward in self.forwards.items() if forward.filled
            },
            "compiled": self.regions is not None and self.regions.compiled,
            "loss_scale": self.loop.updates.state or None,
            **self.watching.told(self.prepared.rows),
            "problems": list(self.problems),
            **facts(self.prepared, self.datasets, self.folder),
        }

    @contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        """Report an error instead of raising it."""
        try:
            yield
        except Exception as error:
            problem = f"{what} failed: {type(error).__name__}: {first_line(error)}"
            self.problems += [] if problem in self.problems else [problem]
