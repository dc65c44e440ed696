"""Commands for the data of a recipe."""

from __future__ import annotations

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

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check the data of a recipe.")


@app.callback()
def data() -> None:
    """Check the data of a recipe."""


@app.command()
def check(
    arguments: Arguments = None, model: Model = None, weights: Weights = None, task: TaskName = None,
    train: Train = None, eval: Eval = None, test: Test = None, method: MethodName = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Read all data and report every problem in one pass. Nothing is trained; the exit status is 1 if there are problems.

    A model is optional; if given, its tokenizer or processor measures lengths, and no weights are read.
    """
    values = recipe_values(arguments, given_values(model, weights, task, train, eval, test, method, None))
    from graftkit.report.checked import show_check
    from graftkit.runs.check import check_values

    found = check_values(values, {})
    if not as_json:
        show_check(console_of(False), found)
    emit(as_json, found.as_dict())
    if not found.ok:
        raise typer.Exit(1)
