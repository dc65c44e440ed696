"""Shared by all commands: options, recipes from arguments, output. No torch here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.errors import UserError
from graftkit.recipe.environment import is_first

if TYPE_CHECKING:
    from graftkit.recipe.schema import Recipe
    from graftkit.report.console import Console

Json = Annotated[bool, typer.Option("--json", help="print a single JSON object to standard output")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE.yaml] [key=value ...]", help="a recipe, and settings that override it"),
]
Model = Annotated[str | None, typer.Option(help="model folder, hub id, or package.module:function")]
Weights = Annotated[
    str | None, typer.Option(help="safetensors file for the module that package.module:function returns")
]
TaskName = Annotated[str | None, typer.Option("--task", help="the task, for example classify")]
Train = Annotated[str | None, typer.Option(help="training rows")]
Eval = Annotated[
    str | None, typer.Option(help="rows to evaluate on, or the fraction of the training rows to hold out")
]
Test = Annotated[str | None, typer.Option(help="test rows, evaluated once after training")]
MethodName = Annotated[
    str | None, typer.Option("--method", help="the method, for example 'lora(rank=8) + head()'")
]
Out = Annotated[str | None, typer.Option(help="run folder; default: a new one under runs/")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="the most memory that the run may take, for example 8GB; chooses what the recipe leaves open"
    ),
]
Time = Annotated[
    str | None,
    typer.Option(
        help="the most time that the run may take, for example 30min; chooses what the recipe leaves open"
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]


def recipe_values(arguments: list[str] | None, given: dict[str, Any]) -> dict[str, Any]:
    from graftkit.recipe.values import override, place, read

    arguments = list(arguments or [])
    values: dict[str, Any] = {}
    if arguments and "=" not in arguments[0]:
        values = read(Path(arguments.pop(0)))
    files = [argument for argument in arguments if "=" not in argument]
    if files:
        raise UserError(f"{files[0]!r} is neither the recipe (which comes first) nor a key=value setting.")
    for key, value in given.items():
        if isinstance(value, str) and not value.strip():
            raise UserError(f"--{key.removeprefix('data.')} is empty.")
        if value is not None:
            place(values, key, _share(value) if key == "data.eval" else value)
    return override(values, arguments)


def _share(text: str) -> str | float | None:
    if text in ("null", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        return text


def given_values(model: Any, weights: Any, task: Any, train: Any, eval: Any, test: Any, method: Any,
           out: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "model": model, "weights": weights, "task": task, "data.train": train, "data.eval": eval, "data.test": test,
        "method": method, "out": out,
    }  # fmt: skip


def console_of(as_json: bool) -> Console:
    from graftkit.report.console import Console

    return Console(json=as_json)


def emit(as_json: bool, value: dict[str, Any]) -> None:
    if as_json and is_first():
        print(json.dumps(value, ensure_ascii=False))
        flush_output()


def flush_output() -> None:
    """Raise `UserError` if standard output cannot take what was printed, `BrokenPipeError` if its reader has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(lost_output(error)) from None


def lost_output(error: OSError) -> str:
    """Say that standard output cannot take what was printed, and print nothing more there."""
    from graftkit.report.streams import drop

    drop(sys.stdout)
    return f"standard output cannot be written: {error.strerror or error}."


def limited(
    values: dict[str, Any], memory: str | None, time: str | None, console: Console
) -> tuple[Recipe, list[str]]:
    """Return the recipe of these values, within limits of memory and time if there are any, and what was given up for them."""
    from graftkit.recipe import schema as recipes

    if memory is None and time is None:
        return recipes.make(values), []
    recipes.make(values)  # its mistakes come first, before torch is loaded
    from graftkit.runs.within import Limits, within

    return within(values, Limits.of(memory, time), console)
