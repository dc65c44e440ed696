"""Commands for what is done with finished runs and grafts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from graftkit.cli_options import Json, RunFolder, console_of, emit
from graftkit.errors import UserError


def evaluate(
    run: RunFolder, data: Annotated[str, typer.Option(help="labelled rows")], as_json: Json = False
) -> None:
    """Metrics of a run on labelled rows."""
    _refuse_empty(data)
    from graftkit.use import evaluate as run_evaluate

    found = run_evaluate(run, data)
    if as_json:
        emit(True, found)
        return
    from graftkit.report.summary import show_metrics

    show_metrics(console_of(False), found, found["headline"])


def _refuse_empty(data: str | None) -> None:
    if data is not None and not data.strip():
        raise UserError("--data is empty; name a file of rows.")


def predict(
    run: RunFolder,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT ...]", help="texts to answer")] = None,
    data: Annotated[str | None, typer.Option(help="rows to answer, a file")] = None,
    out: Annotated[
        Path | None, typer.Option(help="write the answers as JSON lines or, for .csv, as CSV")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the file of answers if it exists")] = False,
    as_json: Json = False,
) -> None:
    """Answers of a run for texts or for the rows of a file."""
    if bool(texts) == (data is not None):
        raise UserError("give either texts or --data FILE to predict.")
    _refuse_empty(data)
    from graftkit.report.table import check_path, write_rows

    if out is not None:
        check_path(out, data, overwrite)
    from graftkit.use import answer

    found = answer(run, data if data is not None else texts)
    predictions = found["predictions"]
    if out is not None:
        write_rows(out, predictions)
    lines = found.pop("lines")
    if found["skipped"]:
        print(
            f"{found['skipped']} bad rows were left out:",
            *found["skipped_rows"][:20],
            sep="\n",
            file=sys.stderr,
        )
    if as_json:
        emit(True, {"run": str(run), **found})
    elif out is not None:
        print(f"{len(predictions)} answers are in {out}", file=sys.stderr)
    else:
        print("\n".join(lines))


def merge(
    grafts: Annotated[list[Path], typer.Argument(metavar="GRAFT", help="LoRA grafts: folders of grafts, runs or PEFT")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    weights: Annotated[str | None, typer.Option(help="one for each graft, as in 0.7,0.3; default: all the same")] = None,
    how: Annotated[str, typer.Option(help="cat, svd, linear, ties, dare, magnitude; ties-svd and the like")] = "cat",
    density: Annotated[float | None, typer.Option(help="share kept by ties, dare and magnitude")] = None,
    rank: Annotated[int | None, typer.Option(help="rank of the result of svd; default: the largest of the grafts")] = None,
    heads: Annotated[str, typer.Option(help="mean (by weight), first or none")] = "mean",
    sign: Annotated[str, typer.Option(help="majority in ties: total (by sum) or frequency")] = "total",
    seed: Annotated[int, typer.Option(help="seed of dare")] = 0,
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make one LoRA graft of several, without loading their model.

    cat is the weighted sum itself, with a rank as large as all together; svd comes nearest to it at a lower rank.
    """
    from graftkit.merging import merge as run_merge

    folder = run_merge(
        grafts, out, weights=_numbers(weights), how=how, density=density, rank=rank, heads=heads, sign=sign, seed=seed,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        emit(True, {"graft": str(folder)})
    else:
        print(f"the merged graft is in {folder}", file=sys.stderr)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights is {text!r}; write numbers with commas between them: 0.7,0.3.") from None


def export(
    run: RunFolder, to: Annotated[Path, typer.Option(help="folder to write")],
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it holds a model")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a run as a plain model: the graft folded in, compared with the run on real rows."""
    from graftkit.export import export as run_export

    done = run_export(run, to, overwrite=overwrite)
    emit(as_json, done)
    if not as_json:
        print(f"written: {done['to']} ({', '.join(done['files'])})")
        which = "rows" if done["rows_real"] else "made-up rows (no data file of the run could be read)"
        print(
            f"compared on {done['rows_compared']} {which}: largest difference of a logit {done['largest_difference']:.2g}"
        )
        print(f"load it with: {done['load_with']}")
