"""The commands that make several runs of one recipe: `graftkit compare` and `graftkit curve`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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
from graftkit.errors import UserError

SEVERAL = ("--methods", "--few")
SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


class SeveralValues(TyperCommand):
    """A command with options that take several values: `--few 5 10 30`, up to the next option or key=value setting."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        made: list[str] = []
        option = ""
        for word in args:
            if word.startswith("-"):
                option = word if word in SEVERAL else ""
                if not option:
                    made.append(word)
            elif option and not SETTING.match(word):
                made += [option, word]
            else:
                option = ""
                made.append(word)
        return super().parse_args(ctx, made)


Methods = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METHOD ...", help="the methods to compare, or all: every method that the task and model take"
    ),
]
Seeds = Annotated[int | None, typer.Option(help="runs with different seeds; default 3")]
OutFolder = Annotated[str | None, typer.Option(help="folder of all runs; default: a new one under runs/")]


def compare(
    arguments: Arguments = None, methods: Methods = None, model: Model = None, weights: Weights = None,
    task: TaskName = None, train: Train = None, eval: Eval = None, test: Test = None, out: OutFolder = None,
    seeds: Seeds = None,
    search: Annotated[int | None, typer.Option(help="learning rates to try for each method; default 4")] = None,
    few: Annotated[
        list[int] | None, typer.Option(metavar="ROWS ...", help="draw these numbers of rows per class, for learning curves")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="go on with an interrupted comparison")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compare methods: the same rows and steps, a learning rate searched for each, several seeds, paired differences."""
    given = given_values(model, weights, task, train, eval, test, None, out)
    console = console_of(as_json)
    more = {"methods": methods or None, "seeds": seeds, "search": search, "few": few or None}
    if resume is not None:
        _refuse_beside_resume(arguments, given | more)
        from graftkit.studies.compare import resume_compare

        emit(as_json, resume_compare(resume, console).result)
        return
    from graftkit.recipe import schema as recipes

    recipe = recipes.make(_values(arguments, given) | {"method": None})
    from graftkit.studies.compare import SEARCH, SEEDS, Asked, run_compare

    asked = Asked(
        tuple(methods or ()),
        SEEDS if seeds is None else seeds,
        SEARCH if search is None else search,
        tuple(few or ()),
    )
    emit(as_json, run_compare(recipe, asked, console).result)


def _values(arguments: list[str] | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe, without the run folder that its file names."""
    values = recipe_values(arguments, given)
    if given["out"] is None and not any(word.startswith("out=") for word in arguments or ()):
        values.pop("out", None)
    return values


def _refuse_beside_resume(arguments: list[str] | None, given: dict[str, Any]) -> None:
    if arguments or any(value is not None for value in given.values()):
        raise UserError(
            "--resume goes on as it began; it takes no other options or settings. To add methods or seeds, give the same "
            "recipe again with --out and the same folder."
        )


def curve(
    arguments: Arguments = None, model: Model = None, weights: Weights = None, task: TaskName = None, train: Train = None,
    eval: Eval = None, test: Test = None, method: MethodName = None, out: OutFolder = None,
    points: Annotated[int | None, typer.Option(help="numbers of rows, each half of the next; default 4")] = None,
    seeds: Seeds = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="go on with an interrupted curve")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Tell whether more rows would help: a learning curve over parts of the rows, continued by a power law."""
    given = given_values(model, weights, task, train, eval, test, method, out)
    console = console_of(as_json)
    more = {"points": points, "seeds": seeds}
    if resume is not None:
        _refuse_beside_resume(arguments, given | more)
        from graftkit.studies.curve import resume_curve

        emit(as_json, resume_curve(resume, console).result)
        return
    from graftkit.recipe import schema as recipes

    recipe = recipes.make(_values(arguments, given))
    from graftkit.studies.curve import Asked, run_curve

    asked = Asked(**{key: value for key, value in more.items() if value is not None})
    emit(as_json, run_curve(recipe, asked, console).result)
