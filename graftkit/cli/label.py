"""Commands for rows that have no labels yet."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from graftkit.cli.options import Json, TaskName, Weights, emit

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Choose rows to label next, and suggest labels."
)

Pool = Annotated[str, typer.Option(help="rows without labels")]
Run = Annotated[Path | None, typer.Option(help="a finished run, whose answers tell which rows are uncertain")]
ModelOrMoved = Annotated[
    str | None,
    typer.Option(
        help="instead of a run: a model to take features from; with --run: its model's new location"
    ),
]
Labelled = Annotated[str | None, typer.Option("--train", help="the rows that are labelled already")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="settings of a recipe, such as data.columns"),
]
Out = Annotated[Path, typer.Option(help="file to write: .csv, .tsv, .jsonl or .parquet")]
Overwrite = Annotated[bool, typer.Option(help="replace the file if it exists")]


@app.callback()
def label() -> None:
    """Choose rows to label next, and suggest labels."""


@app.command()
def next(
    count: Annotated[int, typer.Argument(help="how many rows")],
    pool: Pool,
    settings: Settings = None,
    run: Run = None,
    model: ModelOrMoved = None,
    weights: Weights = None,
    train: Labelled = None,
    task: TaskName = None,
    out: Out = Path("label-next.csv"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Choose the rows of a pool to label next: uncertain, typical, and no near-duplicates.

    With a run, or a model and labelled rows; with a model alone, the rows are those that are typical of the pool. The file has
    an empty column for the label.
    """
    given = _given(pool, settings, run, model, weights, train, task, out, overwrite)
    from graftkit.runs.label import label_next

    _write(out, label_next(pool, count, **given), as_json, suggests=False)


@app.command()
def suggest(
    pool: Pool,
    settings: Settings = None,
    run: Run = None,
    model: ModelOrMoved = None,
    weights: Weights = None,
    train: Labelled = None,
    task: TaskName = None,
    out: Out = Path("label-suggest.csv"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a label and its probability for each row of a pool, to be corrected.

    The least certain rows come first. The file has the suggestion twice: as it is, and in the column of the label, where it is
    corrected.
    """
    given = _given(pool, settings, run, model, weights, train, task, out, overwrite)
    from graftkit.runs.label import label_suggest

    _write(out, label_suggest(pool, **given), as_json, suggests=True)


def _given(
    pool: str, settings: list[str] | None, run: Any, model: Any, weights: Any, train: Any, task: Any, out: Path,
    overwrite: bool,
) -> dict[str, Any]:  # fmt: skip
    from graftkit.recipe.values import override
    from graftkit.report.table import check_path

    check_path(out, pool, overwrite)  # before torch is loaded
    values = override({} if weights is None else {"weights": str(weights)}, settings or [])
    return {"run": run, "model": model, "train": train, "task": task, "settings": _dotted(values)}


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key in ("data", "train"):
            found |= _dotted(value, f"{key}.")
        else:
            found[prefix + key] = value
    return found


def _write(out: Path, found: dict[str, Any], as_json: bool, suggests: bool) -> None:
    from graftkit.report.labelling import to_fill_in
    from graftkit.report.table import held, writing

    with held(out) as beside, writing(out, beside) as write:
        write(to_fill_in(found, suggests))
    for note in found["notes"]:
        print(f"note: {note}", file=sys.stderr)
    shown = {key: value for key, value in found.items() if key not in ("columns", "label")}
    emit(as_json, {**shown, "out": str(out)})
    if not as_json:
        count = len(found["rows"])
        what = "suggested label" if suggests else "row"
        rest = "" if suggests else " to label"
        are = f"{what}s{rest} are" if count != 1 else f"{what}{rest} is"
        print(f"{count:,} {are} in {out}; the column {found['label']!r} is yours.")
