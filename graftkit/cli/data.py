"""Commands for the data of a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from graftkit.cli.options import (
    Arguments,
    Eval,
    Json,
    MethodName,
    Model,
    TaskName,
    Test,
    Train,
    Weights,
    console_of,
    emit,
    given_values,
    recipe_values,
)

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Check the data of a recipe, and correct its labels."
)


@app.callback()
def data() -> None:
    """Check the data of a recipe, and correct its labels."""


@app.command()
def check(
    arguments: Arguments = None, model: Model = None, weights: Weights = None, task: TaskName = None,
    train: Train = None, eval: Eval = None, test: Test = None, method: MethodName = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="find labels that are likely wrong, near duplicates and outliers, with a model")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the suspicious labels to a new CSV file to correct")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write a page to an HTML file")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Read all data and report every problem in one pass. Nothing is trained; the exit status is 1 if there are problems.

    A model is optional; if given, its tokenizer or processor measures lengths, and no weights are read. --labels needs one,
    whose features tell which labels are likely wrong; the data is not changed. `graftkit data fix` applies corrections.
    """
    from graftkit.errors import UserError

    if csv is not None and not labels:
        raise UserError("--csv writes suspicious labels, so it needs --labels.")
    values = recipe_values(arguments, given_values(model, weights, task, train, eval, test, method, None))
    from graftkit.report.checked import show_check
    from graftkit.runs.check import check_values
    from graftkit.runs.fixing import refuse_existing, write_suspects

    if csv is not None:
        refuse_existing(csv)
    found = check_values(values, {}, judged=labels, html=html)
    if csv is not None and found.suspects is not None:
        write_suspects(csv, found)
    if not as_json:
        show_check(console_of(False), found)
        if html is not None:
            print(f"written: {html}", file=sys.stderr)
    emit(as_json, found.as_dict())
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def fix(
    corrected: Annotated[Path, typer.Argument(metavar="CSV", help="what `data check --labels --csv` wrote, with corrected labels")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="the new file of rows")],
    file: Annotated[str | None, typer.Option(help="the file to copy, if the labels of several were corrected")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a copy of a file of rows with the labels of a corrected CSV, and leave out rows whose label was emptied.

    The file itself is not changed. If it has changed since its labels were checked, nothing is written.
    """
    from graftkit.runs.fixing import fix as apply

    done = apply(corrected, out, file)
    console_of(as_json).line(
        f"{done['out']}: {done['file']} with {done['changed']:,} labels changed and {done['left_out']:,} rows left out"
    )
    emit(as_json, done)
