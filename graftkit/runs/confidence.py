"""How sure the answers of a run are: fitted at its end on what its evaluations showed, and used when it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.data.by_tokens import prediction_batches, prediction_sizes
from graftkit.data.source import Batch
from graftkit.engine.cached import CachedForward
from graftkit.engine.forward import Forward, evaluating
from graftkit.engine.memory import in_parts
from graftkit.engine.parallel import gather
from graftkit.engine.predict import ADVICE, predict
from graftkit.errors import UserError, first_line
from graftkit.files import read_json
from graftkit.grafts.graft import Graft
from graftkit.grafts.stored import CONFIDENCE, DESCRIPTION
from graftkit.insight import confidence_file
from graftkit.insight.confidence import (
    FEW,
    Confidence,
    calibration_error,
    check_coverage,
    fit,
    limit_of,
    sets_of,
)
from graftkit.insight.confidence_evidence import (
    LABEL,
    WORDS,
    Evidence,
    Recorder,
    evidence_of,
    last_layer,
    sample_of,
)
from graftkit.insight.confidence_known import ROWS, Known, fit_known, reference_rows
from graftkit.runs.noticed import noticed
from graftkit.runs.prepare import Prepared, Rows
from graftkit.tasks.base import Calls, Dataset, Task

COST = 0.06  # training rows whose features are computed at the end of a run, by rows trained on: two percent of the time
FEWEST = 200  # of them, if there are as many


class Watching:
    """Keeps what the evaluations of a run show of its rows, to fit confidence on at its end."""

    def __init__(self, prepared: Prepared, datasets: Mapping[str, Dataset]) -> None:
        self.prepared, self.datasets = prepared, datasets
        self.last: dict[str, Recorder] = {}
        self.best: Recorder | None = None
        self.found: Confidence | None = None
        self.about: dict[str, Any] = {}
        self.evidence: dict[str, Evidence] = {}  # of the evaluation and the test rows, with the best weights

    def recording(self, name: str, forward: Calls) -> Calls:
        """Return the forward pass for an evaluation."""
        task, dataset = self.prepared.rows.task, self.datasets[name]
        if task.calibrates is None:
            return forward
        chosen = sample_of(dataset, len(self.prepared.rows.labels))
        self.last[name] = Recorder(forward, task, chosen)
        return self.last[name]

    def keep(self) -> None:
        """Keep what the last evaluation showed: its weights are the best so far."""
        self.best = self.last.pop("eval", None)

    def fit(self, folder: Path, forwards: Callable[[str, int], Forward], main: bool) -> None:
        """Fit on the evaluation rows and write the result beside the graft in `folder`, in the first process.

        `forwards`: returns the forward pass of the training or evaluation rows; these are evaluated again with the best
        weights if the run was resumed since it did so.
        """
        task = self.prepared.rows.task
        if task.calibrates is None or "eval" not in self.datasets:
            return
        if self.best is None:
            recorder = self.recording("eval", forwards("eval", 1))
            predict(self.datasets["eval"], recorder, task, *prediction_sizes(self.prepared.recipe.train))
            self.keep()
        assert self.best is not None
        evidence = self.evidence["eval"] = evidence_of(gather(self.best.recorded))
        if not main:
            return
        try:
            known, note = self._known(evidence, forwards("train", 1))
        except Exception as error:  # the temperature does not need it
            known, note = (
                None,
                f"rows like no label cannot be told: {type(error).__name__}: {first_line(error)}",
            )
        self.found = fit(evidence, task.calibrates == LABEL, known, note)
        confidence_file.write(folder, read_json(folder / DESCRIPTION), self.found)
        self.about = told(self.found)

    def tested(self) -> None:
        """Add the calibration error on the test rows."""
        if "test" not in self.last:
            return
        evidence = self.evidence["test"] = evidence_of(gather(self.last.pop("test").recorded))
        if self.found is not None:
            self.about["test"] = errors(evidence, self.found.temperature)

    def told(self, rows: Rows) -> dict[str, Any]:
        """Return what result.json says of how sure the answers are, and what the run noticed in its rows."""
        found: dict[str, Any] = {}
        with suppress(Exception):  # costs no run
            temperature = 1.0 if self.found is None else self.found.temperature
            found = noticed(rows, self.datasets, self.evidence, temperature)
        return {"confidence": self.about, "noticed": found}

    def _known(self, evidence: Evidence, forward: Forward) -> tuple[Known | None, str]:
        prepared, settings = self.prepared, self.prepared.settings
        rows, task, sizes = prepared.rows, prepared.rows.task, prediction_sizes(prepared.recipe.train)
        possible, note = can_tell(evidence, task)
        if not possible:
            return None, note
        assert evidence.features is not None
        whole = isinstance(forward, CachedForward) and forward.start.last
        trained = settings.steps * prepared.plan.batch_size
        most = ROWS if whole else max(FEWEST, 4 * len(rows.labels), int(COST * trained))
        chosen = reference_rows(label_numbers(prepared.train), most, evidence.features.shape[1])
        if whole:
            return fit_known(observed(prepared.train, forward, task, sizes, chosen), evidence)
        dataset = task.dataset(rows.train.take(chosen.tolist()), prepared.backbone, prepared.max_length)
        plain = Forward(prepared.graft, prepared.device, prepared.precision)
        return fit_known(observed(dataset, plain, task, sizes), evidence)


def label_numbers(dataset: Dataset) -> np.ndarray:
    """Return the label of each row, (rows,); 0 where a row has any number of labels."""
    targets = np.asarray(dataset.examples.targets)
    return targets if targets.ndim == 1 else np.zeros(len(targets), np.int64)


def can_tell(evidence: Evidence, task: Task) -> tuple[bool, str]:
    """Return whether rows that are like no label can be told, and if not why, where it could be otherwise."""
    if task.calibrates == WORDS or not task.head:
        return False, ""
    reason = ""
    if evidence.features is None:
        reason = "the model has no layer that reads one vector for a row"
    elif len(evidence.logits) < FEW:
        reason = f"there are fewer than {FEW} evaluation rows, which also give no temperature"
    elif not np.isfinite(evidence.features).all():
        reason = "features of evaluation rows are not finite"
    return not reason, f"rows like no label cannot be told: {reason}" if reason else ""


@torch.no_grad()
def observed(
    dataset: Dataset, forward: Forward, task: Task, sizes: tuple[int, int | None], rows: np.ndarray | None = None
) -> Evidence:  # fmt: skip
    """Return the outputs of rows, by default all, computed by this process alone."""
    rows = np.arange(len(dataset)) if rows is None else rows
    recorder = Recorder(forward, task, np.ones(len(dataset), bool))

    def compute(part: np.ndarray) -> Tensor:
        return recorder(dataset.batch(part, forward.device))

    with evaluating(forward.graft.model):
        for places in prediction_batches(dataset.lengths[rows], *sizes):
            for _ in in_parts(rows[places], forward.device, compute, ADVICE):
                pass
    return evidence_of([recorder.recorded])


def errors(evidence: Evidence, temperature: float) -> dict[str, float]:
    """Return the expected calibration error without and with a temperature."""
    return {"before": calibration_error(evidence), "after": calibration_error(evidence, temperature)}


def told(found: Confidence) -> dict[str, Any]:
    """Return what result.json says of what was fitted."""
    known = (
        None if found.known is None else {"threshold": found.known.threshold, "rows": len(found.known.labels)}
    )
    note = {"note": found.note} if found.note else {}
    return {
        "temperature": found.temperature, "rows": found.rows, "before": found.before, "after": found.after,
        "known": known, **note,
    }  # fmt: skip


def scale_outputs(graft: Graft, temperature: float, holds: Callable[[], object]) -> bool:
    """Divide the layer that outputs the logits by a temperature. `holds` raises `UserError` unless that has divided the
    logits; then the layer is restored, and the result is False."""
    layer: Any = last_layer(graft)
    if layer is None:
        return False
    parts = [part for part in (layer.weight, layer.bias) if part is not None]
    before = [part.detach().clone() for part in parts]
    with torch.no_grad():
        for part in parts:
            part.div_(temperature)
        try:
            holds()
        except UserError:
            for part, values in zip(parts, before):
                part.copy_(values)
            return False
    return True


class Scaled:
    """A forward pass whose outputs are divided by a temperature."""

    def __init__(self, forward: Calls, temperature: float) -> None:
        self.forward, self.temperature = forward, temperature
        self.graft, self.device = forward.graft, forward.device

    def base(self, batch: Batch) -> Tensor:
        return self.forward.base(batch)

    def __call__(self, batch: Batch) -> Tensor:
        return self.forward(batch) / self.temperature


class Sure:
    """How sure a finished run is of its answers.

    `coverage`: the probability with which a set of labels is to hold the right one; None for no sets.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], task: Task, coverage: float | None = None
    ) -> None:
        """Raises `UserError` for a coverage that the run cannot give."""
        self.labels: list[str] = about["labels"]
        self.limit: float | None = None
        if coverage is not None:
            check_coverage(coverage)
            if task.calibrates != LABEL:
                raise UserError(
                    f"coverage gives sets of labels, for tasks with one of several labels for a row; {task.name}() of this "
                    "run has other answers. Leave coverage out."
                )
        self.task, self.place = task, folder / "graft" / CONFIDENCE
        self.found: Confidence | None = None
        if task.calibrates is not None:
            self.found = confidence_file.read(folder / "graft", about)
        if coverage is not None:
            scores = None if self.found is None else self.found.scores
            if scores is None:
                raise UserError(
                    f"the run in {folder} was not calibrated, as it had no evaluation rows or was made by an earlier version; "
                    f"calibrate it on labelled rows that it was not trained on: graftkit calibrate {folder} --data FILE."
                )
            self.limit = limit_of(scores, coverage, str(folder))
        self.recorder: Recorder | None = None

    @property
    def temperature(self) -> float:
        return 1.0 if self.found is None else self.found.temperature

    def watching(self, forward: Calls, dataset: Dataset) -> Calls:
        """Return the forward pass to answer the rows of a dataset with."""
        if self.found is None:
            return forward
        if self.found.known is not None or self.limit is not None:
            forward = self.recorder = Recorder(forward, self.task, np.ones(len(dataset), bool))
        return Scaled(forward, self.temperature)

    def recording(self, forward: Calls, dataset: Dataset) -> Calls:
        """Return the forward pass to evaluate the rows of a dataset with: its outputs are not scaled."""
        if self.found is None:
            return forward
        self.recorder = Recorder(forward, self.task, sample_of(dataset, len(self.labels)))
        return self.recorder

    def errors(self) -> dict[str, float] | None:
        """Return the temperature, and the calibration error without and with it on the rows that were evaluated."""
        if self.found is None or self.recorder is None:
            return None
        evidence = evidence_of([self.recorder.recorded])
        return {"temperature": self.temperature, **errors(evidence, self.temperature)}

    def added(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the answers with `labels`, the set, and `known`, if this run tells them."""
        if self.found is None or self.recorder is None:
            return answers
        evidence, self.recorder = evidence_of([self.recorder.recorded]), None
        if self.limit is not None:
            sets = sets_of(evidence.logits, self.temperature, self.limit)
            answers = [{**answer, "labels": [self.labels[i] for i in s]} for answer, s in zip(answers, sets)]
        known = self.found.known
        if known is not None and evidence.features is not None:
            if known.vectors.shape[1] != evidence.features.shape[1]:
                raise UserError(f"{self.place} does not fit the model; {confidence_file.AGAIN}.")
            flags = known.of(evidence.features, evidence.logits).tolist()
            answers = [{**answer, "known": flag} for answer, flag in zip(answers, flags)]
        return answers
