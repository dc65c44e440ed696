"""Explain the answers of a finished run: which parts of the input they come from, and the training rows that are nearest."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.data.columns import find_again
from graftkit.engine.cached import Caching
from graftkit.errors import UserError
from graftkit.files import replacing, write_text
from graftkit.insight.attribution import STEPS, Explanation, check_method
from graftkit.insight.attribution import explain as explain_row
from graftkit.insight.attribution_pictures import overlay as draw
from graftkit.insight.features import features_of
from graftkit.insight.knn import unit
from graftkit.report.explained import explanations_page
from graftkit.report.making import check_path
from graftkit.runs.folder import PLAN
from graftkit.runs.given import training_rows
from graftkit.runs.inputs import digests
from graftkit.runs.labels import file_of
from graftkit.runs.predict import Answers, Loaded, Opened, load_run
from graftkit.runs.saved import ROWS, read_plan
from graftkit.tasks.base import Dataset, Examples, Task
from graftkit.tasks.explained import index_of
from graftkit.tasks.shared.labels import label_text

MOST_ROWS = 50  # in one call
NEAREST = 3
MOST_TRAINING = 20_000  # training rows whose features are compared


def explain(
    run: str | Path, given: Any, *, rows: Sequence[int] | None = None, method: str | None = None, steps: int = STEPS,
    label: str | None = None, word: str | None = None, nearest: int = NEAREST, html: str | Path | None = None,
    overlay: str | Path | None = None, model: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Explain answers of a finished run: `graftkit explain` in Python.

    `given`: a list of texts, pairs, or files of images or sounds, or the name of a data file, or a table in memory. `rows`:
    which rows of a file to explain, by the numbers that `predict` gives as `row`; at most 50 are explained at once.
    `method`: 'integrated_gradients' with `steps` points, 'gradient_x_input', 'grad_cam' (images, CNNs) or 'attention'
    (texts, and images of patches); by default Grad-CAM or attention for images, and integrated gradients otherwise.
    `label`: explain why this label is likely or not, instead of the answer. `word`: explain the tag of this word. `nearest`:
    number of training rows to show, at most 3; 0 saves reading them. `html`: an HTML file to write. `overlay`: a PNG file to
    write, for one image or sound. `model`: the new location of the run's backbone, if it has moved.

    Each explanation has the `label` and its `probability`, or the `value`; the `method`; `parts`, each with its `score` (the
    absolute values sum to 1; positive speaks for the answer) and `text`, `start`, `end` in characters, `box` in pixels of
    the image as the model reads it (left, top, right, bottom), or `start` and `end` in seconds; `deletion`, `nearest` and
    `notes`; and the `completeness` of integrated gradients. Raises `UserError` for a run that is not finished, tasks without
    explanations, empty texts, too many rows, unknown labels and methods, and methods that do not fit the model.
    """
    method = None if method is None else method.replace("-", "_")
    check_method(method, steps)
    page, picture = _checked(html, overlay, nearest)
    answers = Answers(run, given, model=model)
    opened = answers.run
    _refuse(opened, label, word)
    examples = _examples(answers, rows)
    if picture is not None and (len(examples) != 1 or type(opened.task).pictured is Task.pictured):
        raise UserError(
            f"an overlay shows one image or sound, but {len(examples)} row{'s' * (len(examples) != 1)} of {opened.task.name}() "
            "are given; choose one with rows, or write a page with html."
        )
    loaded = load_run(opened, exact=True)
    datasets = [
        loaded.task.dataset(examples.take([i]), loaded.backbone, loaded.max_length)
        for i in range(len(examples))
    ]
    close = (
        _nearest(opened, loaded, datasets, nearest)
        if nearest
        else Near([[] for _ in datasets], (), [[] for _ in datasets])
    )
    made = [
        explain_row(loaded.forward, loaded.task, one, loaded.labels, method=method, steps=steps, label=label, word=word)
        for one in datasets
    ]  # fmt: skip
    numbers = [{"row": number} if answers.numbered else {} for number in examples.table.numbers]
    found = [
        {**numbers[i], **loaded.task.asked(examples, i), **_said(one, loaded.labels), "nearest": close.rows[i],
         "notes": [*one.notes, *close.notes]}
        for i, one in enumerate(made)
    ]  # fmt: skip
    _write(page, picture, opened, made, found, close.shown)
    return found


def _write(
    page: Path | None, picture: Path | None, run: Opened, made: Sequence[Explanation], found: list[dict[str, Any]],
    near: list[list[str | None]],
) -> None:  # fmt: skip
    """Write the files that were asked for."""
    if page is None and picture is None:
        return
    drawn = [_picture(one) for one in made]
    if picture is not None:
        assert drawn[0] is not None
        with replacing(picture) as part:
            part.write_bytes(drawn[0])
    if page is not None:
        shown = [None if one is None else _uri(one) for one in drawn]
        write_text(page, explanations_page(str(run.folder), run.recipe.task, found, shown, near))


def _checked(
    html: str | Path | None, overlay: str | Path | None, nearest: int
) -> tuple[Path | None, Path | None]:
    """Return the paths of the files to write. Raises `UserError` for other kinds of files, and a number out of range."""
    if not 0 <= nearest <= NEAREST:
        raise UserError(f"nearest is {nearest}; it must be between 0 and {NEAREST}.")
    page = None if html is None else Path(html).expanduser()
    if page is not None:
        check_path(page)
    picture = None if overlay is None else Path(overlay).expanduser()
    if picture is not None and (picture.suffix.lower() != ".png" or picture.is_dir()):
        raise UserError(f"the overlay {picture.name!r} is a PNG file; use a name that ends in .png.")
    if picture is not None and picture.exists():
        raise UserError(f"{picture} exists; name another file for the overlay.")
    return page, picture


def _refuse(run: Opened, label: str | None, word: str | None) -> None:
    """Raise `UserError` for what the task of a run cannot explain."""
    task = run.task
    if not task.explains:
        raise UserError(
            f"answers of {task.name}() cannot be explained: explain scores what speaks for one of a run's labels, for a number "
            "or for a span, as of classify(), image_classify(), audio_classify(), tag() and span()."
        )
    if word is not None and not task.per_word:
        raise UserError(f"word={word!r}: {task.name}() has one answer for a whole row; leave the word out.")
    if label is not None and run.labels:
        index_of(label, run.labels)


def _examples(answers: Answers, rows: Sequence[int] | None) -> Examples:
    """Return the rows to explain."""
    run, task = answers.run, answers.run.task
    table = task.read(answers.given, answers.reading, "data")
    if rows is not None:
        if not answers.numbered:
            raise UserError(
                "rows are chosen from a file, but texts are given; leave rows out, or name the file."
            )
        places = {number: place for place, number in enumerate(table.numbers)}
        missing = [row for row in rows if row not in places]
        if missing or not rows:
            raise UserError(
                f"{table.unit} {missing[0] if missing else '?'} of {table.source} is no row of it; its rows are those of "
                f"{table.unit}s {min(places)} to {max(places)}, as `predict` numbers them."
            )
        table = table.take([places[row] for row in dict.fromkeys(rows)])
    if len(table) > MOST_ROWS:
        raise UserError(
            f"{len(table):,} rows are too many to explain at once; choose at most {MOST_ROWS} of them with --rows 3,5, or "
            "rows=[3, 5] in Python."
        )
    columns = find_again(table, task.columns, run.columns, leave_out=task.labelled)
    return task.examples(table, columns, run.labels, answers.reading.skip_bad, targets=False)


def _said(made: Explanation, labels: Sequence[str]) -> dict[str, Any]:
    """Return an explanation as values of JSON."""
    parts = [{**part, "score": round(float(score), 6)} for part, score in zip(made.row.parts, made.scores)]
    deletion = dict(made.deletion)
    best = deletion.pop("best_without_top", None)
    if best is not None:
        deletion["label_without_top"] = labels[best]
    return {
        **made.aim.said,
        ("probability" if made.aim.odds else "value"): deletion["before"],
        "method": made.method,
        "parts": parts,
        **({} if made.completeness is None else {"completeness": made.completeness}),
        "deletion": deletion,
    }


def _picture(made: Explanation) -> bytes | None:
    """Return a PNG of an image or sound with its scores; None for a text."""
    picture = made.row.task.pictured(made.row.dataset, made.aim.row, made.row.inputs)
    return None if picture is None else draw(picture, made.row.parts, made.scores)


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


@dataclass(frozen=True)
class Near:
    """The nearest training rows of each explained row, and why there are none or what is odd about them. `shown`: pictures
    of them, as data URIs, of images and sounds."""

    rows: list[list[dict[str, Any]]]
    notes: tuple[str, ...]
    shown: list[list[str | None]]


def _nearest(run: Opened, loaded: Loaded, datasets: Sequence[Dataset], count: int) -> Near:
    """Find the training rows whose features, as the run's head reads them, are the most similar by their cosine.

    Files that are missing or have changed are told in the notes.
    """
    none: list[list[dict[str, Any]]] = [[] for _ in datasets]
    try:
        examples, notes = _training_rows(run, loaded)
        training = loaded.task.dataset(examples, loaded.backbone, loaded.max_length)
        kept = unit(features_of(loaded.forward, training).values)
        found, shown = [], []
        for dataset in datasets:
            asked = features_of(loaded.forward, dataset, Caching("memory")).values.mean(0, keepdims=True)
            similar = (kept @ unit(asked).T)[:, 0]
            order = np.argsort(-similar, kind="stable")[:count].tolist()
            found.append([_as_row(run, training, i, float(similar[i])) for i in order])
            shown.append([_thumbnail(run, training, i) for i in order])
    except UserError as error:
        return Near(none, (f"no training rows are shown: {str(error).rstrip('.')}",), [[] for _ in datasets])
    return Near(found, notes, shown)


def _training_rows(run: Opened, loaded: Loaded) -> tuple[Examples, tuple[str, ...]]:
    """Return the rows that a run was trained on, and notes. Raises `UserError` if they cannot be read."""
    dataset = run.task.dataset(training_rows(run), loaded.backbone, loaded.max_length)
    now, then = digests({"train": dataset}, run.labels), read_plan(run.folder / PLAN).get(ROWS, {})
    notes = []
    if then.get("train") not in (None, now["train"]):
        notes.append(
            f"{run.recipe.data.train} has changed since the run was trained, so the nearest rows may be new to it"
        )
    examples = dataset.examples
    if len(examples) > MOST_TRAINING:
        notes.append(
            f"the nearest rows are those of {MOST_TRAINING:,} of the {len(examples):,} training rows"
        )
        examples = examples.take(
            np.linspace(0, len(examples) - 1, MOST_TRAINING).round().astype(int).tolist()
        )
    return examples, tuple(notes)


def _as_row(run: Opened, training: Dataset, row: int, similarity: float) -> dict[str, Any]:
    """Return a training row as values of JSON. `row`: of the dataset."""
    examples = training.examples
    table = examples.table
    example = row if len(training) == len(examples) else _example_of(training, row)
    found = {**file_of(examples, example), **run.task.asked(examples, example)}
    column = run.columns.get("label")
    if column in table.columns:
        value = table.columns[column][example]
        found["label"] = [str(one) for one in value] if isinstance(value, list | tuple) else label_text(value)
    return {**found, "similarity": round(similarity, 4)}


def _thumbnail(run: Opened, training: Dataset, row: int) -> str | None:
    """Return a small picture of a training row as a data URI; None for a text."""
    preview = run.task.preview(training.examples, row) if len(training) == len(training.examples) else {}
    return preview.get("image", preview.get("spectrogram"))


def _example_of(training: Dataset, row: int) -> int:
    """Return the example of a row of a dataset that splits long texts."""
    where = training.where(row)
    return next(i for i in range(len(training.examples)) if training.examples.where(i) == where)
