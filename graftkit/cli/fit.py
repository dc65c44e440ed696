"""The command that compares backbones on labelled rows."""

from __future__ import annotations

from typing import Annotated

import typer

from graftkit.cli.options import Json, TaskName, Weights, console_of, emit, recipe_values


def fit(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL ... [key=value ...]",
            help="model folders, hub ids or package.module:function, and settings of a recipe",
        ),
    ],
    train: Annotated[str, typer.Option(help="labelled rows")],
    task: TaskName = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Tell which backbone suits the data, before training: a linear probe, nearest rows and LogME on its features.

    Nothing is trained. Features are computed once and kept for later runs. Warnings tell where a model was pre-trained on
    something else than these rows.
    """
    settings = [word for word in models if "=" in word]
    names = [word for word in models if "=" not in word]
    values = recipe_values(settings, {"weights": weights, "task": task, "data.train": train})
    values.setdefault("data", {})["eval"] = None
    from graftkit.report.fitted import show_fit
    from graftkit.runs.fit import fit_values

    found = fit_values(names, values, {}).as_dict()
    show_fit(console_of(as_json), found)
    emit(as_json, found)
