"""Export a finished run: claim the folder, let an exporter write next to it, compare, and swap it in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftkit.claims import LOCK, claimed, is_leftover, remove_leftovers
from graftkit.data.columns import find_again
from graftkit.errors import NotFoldable, UserError, listing
from graftkit.export.base import ROWS, Exportable, Exporter, Sample, compare, logits
from graftkit.export.transformers import Transformers
from graftkit.files import assembling, read_json, write_json, write_text
from graftkit.grafts.fold import why_not
from graftkit.runs.confidence import Sure, scale_outputs
from graftkit.runs.folder import CARD, MODEL, PLAN, RECIPE
from graftkit.runs.predict import Loaded, load_run, open_run
from graftkit.runs.prepare import by_shapes, reading_of
from graftkit.tasks.base import Examples

MARKER = "graftkit_export.json"  # lists the files of an export: no others may be overwritten


def export(
    folder: str | Path,
    to: Path,
    *,
    overwrite: bool = False,
    exporter: Exporter | None = None,
    model: str | None = None,
) -> dict[str, Any]:
    """Write a run to the folder `to`, by default as a plain model of transformers with the graft folded in.

    `model`: the new location of the run's backbone, if it has moved. The outputs are compared with the run's before the
    folder is moved into place. `README.md` is the run's card. `overwrite` replaces an earlier export, but never a folder
    with other files. Raises `NotFoldable` if the method cannot be folded, and `UserError` if the exporter cannot write
    the run or `to` cannot be used.
    """
    exporter, folder = exporter or Transformers(), Path(folder)
    with _claim(folder, to, overwrite) as place:
        return _export(folder, place, exporter, model)


def write_model(folder: Path, examples: Examples) -> Path:
    """Write the plain model of a pre-training run to RUN/model, just before its result is written; return that folder.

    It is compared with the run on rows of `examples`.
    """
    _export(folder, folder / MODEL, Transformers(), None, examples)
    return folder / MODEL


def _export(
    folder: Path, to: Path, exporter: Exporter, model: str | None, examples: Examples | None = None
) -> dict[str, Any]:
    """Export a run that is finished, or one that has these `examples` in memory."""
    opened = open_run(folder, model=model, finished=examples is None)
    with by_shapes():
        shapes = _exportable(load_run(opened, meta=True))
        exporter.refuse(shapes)
        reason = why_not(shapes.graft)
        if reason is not None:
            raise NotFoldable(reason)
    loaded = load_run(opened, exact=True)
    run = _exportable(loaded)
    exporter.refuse(run)  # again: shapes alone do not always tell, as of a user's module
    if run.base is not None:
        _refuse(to, "the model that the run started from", run.base.resolve())
    if examples is None:
        sample = _sample(loaded)
    else:
        sample = Sample(loaded.task.dataset(examples, loaded.backbone, loaded.max_length), True)
    before = logits(run.graft.model, sample, run.device)
    run.graft.fold()
    sure, calibrated = Sure(folder, opened.about, run.task), False
    if run.task.head and sure.temperature != 1:
        scaled = [values / sure.temperature for values in before]

        def holds() -> None:
            compare(scaled, logits(run.graft.model, sample, run.device))

        calibrated = scale_outputs(run.graft, sure.temperature, holds)
        if calibrated:
            before, run = scaled, replace(run, task=run.task.scaled(sure.temperature))
    how, native = exporter.how(run, to), exporter.native(run)
    old = _written_before(to)
    with assembling(to, old, exporter.opened_by) as part:
        exporter.write(run, part)
        write_text(part / "README.md", _card(folder, how))
        files = _note_files(part)
        found = compare(before, exporter.outputs(run, part, sample))
        # first of all, list the files of both, so that an interrupted replacement can be repeated
        write_json(to / MARKER, {"files": sorted({*old, *files})})
    return {
        "run": str(folder), "to": str(to), "files": files, "native": native, "rows_compared": len(sample.rows),
        "rows_real": sample.real, "largest_difference": found.difference, "same_answers": found.same_answers,
        "calibrated": calibrated, "load_with": how, "outputs": run.task.plain(run.labels).get("how"),
    }  # fmt: skip


def _exportable(loaded: Loaded) -> Exportable:
    recipe = loaded.recipe
    return Exportable(
        loaded.graft, loaded.backbone, loaded.task, loaded.labels, loaded.columns, loaded.max_length,
        loaded.forward.device, recipe.model, loaded.source.folder, recipe.quantize,
    )  # fmt: skip


@contextmanager
def _claim(run: Path, to: Path, overwrite: bool) -> Iterator[Path]:
    """Hold the output folder. Yield its full path. Raises `UserError` if it may not be written to."""
    with ExitStack() as stack:
        try:
            to = to.expanduser().resolve()
            _refuse(to, "the run itself", run.resolve())
            _refuse_inside_run(to)
            _refuse_others(to, overwrite)
            stack.enter_context(claimed(to))
            _refuse_others(to, overwrite)  # another export may have finished there in between
            remove_leftovers(to)
        except (OSError, RuntimeError) as error:  # no permission, or a link that leads to itself
            raise UserError(
                f"{str(to)!r} cannot be written to: {getattr(error, 'strerror', None) or error}."
            ) from None
        yield to


def _refuse_inside_run(to: Path) -> None:
    """Raise `UserError` for a folder in a run's: the run could never be overwritten, as it would hold other files."""
    run = next((path for path in to.parents if (path / RECIPE).is_file() and (path / PLAN).is_file()), None)
    if run is not None:
        raise UserError(f"{str(to)!r} is in the folder of the run {str(run)!r}; name a folder outside of it.")


def _refuse(to: Path, what: str, kept: Path) -> None:
    if kept.is_relative_to(to):
        holds = "is" if kept == to else "holds"
        raise UserError(f"{str(to)!r} {holds} {what}; name another folder.")


def _refuse_others(to: Path, overwrite: bool) -> None:
    """Raise `UserError` if `to` holds anything, or with `overwrite` anything but an export."""
    file = next((path for path in (to, *to.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise UserError(f"{str(file)!r} is a file; name a folder to write the model to.")
    if not to.exists() or all(path.name == LOCK or is_leftover(path) for path in to.iterdir()):
        return
    files = _written_before(to)
    folders = {str(parent) for name in files for parent in Path(name).parents}
    there = (
        (path, str(path.relative_to(to)))
        for path in sorted(to.rglob("*"))
        if path != to / LOCK and not is_leftover(path)
    )
    others = [
        name for path, name in there
        if name not in (folders if path.is_dir() and not path.is_symlink() else files)
    ]  # fmt: skip
    if others:
        raise UserError(
            f"{str(to)!r} holds files that are not part of an exported model ({listing(others, 4)}), so it is not "
            "overwritten; name another folder."
        )
    if not overwrite:
        raise UserError(f"{str(to)!r} exists; name another folder or use --overwrite.")


def _written_before(to: Path) -> set[str]:
    """Return the files that earlier exports wrote to a folder, as listed in its marker file."""
    try:
        return {str(name) for name in read_json(to / MARKER)["files"]}
    except (UserError, KeyError, TypeError):
        return set()


def _sample(loaded: Loaded) -> Sample:
    """Return rows of the first data file of the run that can be read, or else made-up rows."""
    data, task, reading = loaded.recipe.data, loaded.task, reading_of(loaded.recipe)
    for source in (data.train, data.eval, data.test):
        if not isinstance(source, str):
            continue
        try:
            table = task.read(source, replace(reading, skip_bad=True), source)
            table = table.take(range(min(4 * ROWS, len(table))))
            columns = find_again(table, task.columns, loaded.columns)
            examples = task.examples(table, columns, loaded.labels, True)
        except UserError:  # it has moved, or was in memory
            continue
        return Sample(task.dataset(examples, loaded.backbone, loaded.max_length), True)
    items = task.made_up(loaded.columns, loaded.labels)
    given = None if items is None else task.given(items[:ROWS], loaded.columns)
    if given is None:
        raise UserError(
            "none of the run's data files can be read, but export compares the plain model with the run on real rows; put "
            "the files back where recipe.yaml expects them."
        )
    table = task.read(given, reading, "rows")
    columns = find_again(table, task.columns, loaded.columns, leave_out=task.labelled)
    examples = task.examples(table, columns, loaded.labels, False, targets=False)
    return Sample(task.dataset(examples, loaded.backbone, loaded.max_length), False)


def _card(run: Path, how: str) -> str:
    """Return the run's card with instructions for the plain model instead of the graft."""
    card = run / CARD
    about = (
        card.read_text(encoding="utf-8").partition("\n## Use\n")[0] if card.is_file() else f"# {run.name}\n"
    )
    return f"{about}\n## Use\n\nThis folder is the plain model, with the graft folded into its weights.\n\n```\n{how}\n```\n"


def _note_files(folder: Path) -> list[str]:
    """List the files of an export in its marker file."""
    written = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    files = sorted([*written, MARKER])
    write_json(folder / MARKER, {"files": files})
    return files
