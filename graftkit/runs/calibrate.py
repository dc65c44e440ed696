"""Fit how sure a finished run is on labelled rows of a file: `graftkit calibrate`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from graftkit.data.by_tokens import prediction_sizes
from graftkit.engine.predict import predict
from graftkit.errors import UserError, first_line
from graftkit.files import write_json
from graftkit.insight import confidence_file
from graftkit.insight.confidence import fit
from graftkit.insight.confidence_evidence import LABEL, Evidence, Recorder, evidence_of, sample_of
from graftkit.insight.confidence_known import ROWS, SHARE, Known, fit_known, reference_rows, with_share
from graftkit.insight.repeated import inputs_of
from graftkit.runs.confidence import can_tell, label_numbers, observed, told
from graftkit.runs.folder import GRAFT, RESULT, held
from graftkit.runs.given import labelled_rows, training_rows
from graftkit.runs.predict import Loaded, Opened, load_run, open_run
from graftkit.runs.saved import read_result
from graftkit.tasks.base import Examples


def calibrate(
    folder: str | Path, data: Any, *, known: float = SHARE, model: str | None = None
) -> dict[str, Any]:
    """Fit temperature, sets of labels and the threshold of unknown rows on labelled rows, a file or a table in memory, and
    store them with the run's graft in place of earlier ones.

    The rows should be like those to be answered, and the run must not have been trained on them. `known`: the share of them
    that is to be known. `model`: the new location of the backbone, if it has moved. Returns what `result.json` then says
    of it. Raises `UserError` for a task whose probabilities are not calibrated.
    """
    if isinstance(known, bool) or not 0 < known < 1:
        raise UserError(f"known is {known!r}, but must be above 0 and below 1, such as {SHARE}.")
    run = open_run(Path(folder), None, model)
    task = run.task
    if task.calibrates is None:
        raise UserError(
            f"{run.recipe.task} cannot be calibrated: it gives no probabilities of labels that could be compared with the "
            "right ones. Calibrated are runs of tasks with classes, such as classify()."
        )
    examples = labelled_rows(run, data, "data")
    loaded = load_run(run)
    dataset = task.dataset(examples, loaded.backbone, loaded.max_length)
    recorder = Recorder(loaded.forward, task, sample_of(dataset, len(run.labels)))
    predict(dataset, recorder, task, *prediction_sizes(run.recipe.train))
    evidence = evidence_of([recorder.recorded])
    near, note = _known(run, loaded, evidence, known)
    found = fit(evidence, task.calibrates == LABEL, near, note)
    with held(run.folder):
        confidence_file.write(run.folder / GRAFT, run.about, found)
        result = read_result(run.folder / RESULT)
        given = {"data": data} if isinstance(data, str) else {}
        notes = list(filter(None, (found.note, _trained_on(run, examples))))
        result["confidence"] = {**told(found), **({"note": "; ".join(notes)} if notes else {}), **given}
        write_json(run.folder / RESULT, result)
    return {"run": str(folder), **result["confidence"]}


def _trained_on(run: Opened, examples: Examples) -> str:
    """Return a note if rows are training rows of the run; only texts are compared, as reading other files takes long."""
    if run.task.modality != "text":
        return ""
    with suppress(UserError):  # they are gone
        known = set(inputs_of(run.task, training_rows(run)))
        seen = sum(key in known for key in inputs_of(run.task, examples))
        if seen:
            are = "are training rows" if seen > 1 else "is a training row"
            return f"{seen:,} of {len(examples):,} rows {are} of this run, which it is surer of than of new ones: leave them out"
    return ""


def _known(run: Opened, loaded: Loaded, evidence: Evidence, share: float) -> tuple[Known | None, str]:
    """Return what tells unknown rows, from the features that are stored already or else from those of the training rows."""
    possible, note = can_tell(evidence, run.task)
    if not possible:
        return None, note
    with suppress(UserError):  # damaged: fitted anew
        before = confidence_file.read(run.folder / GRAFT, run.about)
        if before is not None and before.known is not None:
            return with_share(before.known, evidence, share)
    try:
        train = run.task.dataset(training_rows(run), loaded.backbone, loaded.max_length)
    except UserError as error:
        return (
            None,
            f"rows like no label cannot be told: the training rows cannot be read: {first_line(error)}",
        )
    assert evidence.features is not None
    chosen = reference_rows(label_numbers(train), ROWS, evidence.features.shape[1])
    return fit_known(
        observed(train, loaded.forward, run.task, prediction_sizes(run.recipe.train), chosen), evidence, share
    )
