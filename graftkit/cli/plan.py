"""`graftkit plan`: what a recipe will cost, or pre-training a published geometry on other machines."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftkit.cli.options import (
    Arguments,
    Eval,
    Json,
    Memory,
    MethodName,
    Model,
    Out,
    TaskName,
    Test,
    Time,
    Train,
    Weights,
    console_of,
    emit,
    given_values,
    limited,
    recipe_values,
)
from graftkit.errors import UserError

Geometry = Annotated[
    str | None,
    typer.Option(help="estimate the pre-training of a published geometry instead, for example qwen2-72b"),
]
Tokens = Annotated[str | None, typer.Option(help="with --geometry: tokens to train on, such as 300B or 7T")]
On = Annotated[str | None, typer.Option(help="another machine by its device, for example a100 or h100")]
Gpus = Annotated[int | None, typer.Option(help="with --on: number of devices; default 1")]
Mfu = Annotated[
    float | None,
    typer.Option(help="with --on: the share of the device's bf16 products that is reached; default 0.4"),
]
Length = Annotated[
    int | None, typer.Option(help="with --geometry: tokens in a row; default: as it was published")
]


def plan(
    arguments: Arguments = None, model: Model = None, weights: Weights = None, task: TaskName = None, train: Train = None,
    eval: Eval = None, test: Test = None, method: MethodName = None, out: Out = None, geometry: Geometry = None,
    tokens: Tokens = None, on: On = None, gpus: Gpus = None, mfu: Mfu = None, length: Length = None, memory: Memory = None, time: Time = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Show what a recipe will cost: parameters, memory, time and steps. Nothing is trained."""
    given = given_values(model, weights, task, train, eval, test, method, out)
    other = {"tokens": tokens, "on": on, "gpus": gpus, "mfu": mfu, "length": length}
    stated = {name: value for name, value in other.items() if value is not None}
    if geometry is not None:
        if arguments or any(value is not None for value in given.values()):
            raise UserError("--geometry is about a published model; it takes no recipe, model or data.")
        _elsewhere(geometry, stated, as_json)
        return
    for name in ("tokens", "mfu", "length"):
        if name in stated and (on is None or name != "mfu"):
            raise UserError(
                f"--{name} goes with --geometry NAME, which estimates pre-training on other machines."
            )
    if gpus is not None and on is None:
        raise UserError("--gpus goes with --on DEVICE, for example --on h100.")
    machine = None
    if on is not None:
        from graftkit.plan.training import device_of, refuse_share

        device_of(on)  # before torch is loaded
        refuse_share(1 if gpus is None else gpus, 0.4 if mfu is None else mfu)
    console = console_of(as_json)
    recipe, gave_up = limited(recipe_values(arguments, given), memory, time, console)
    from graftkit.runs.tune import plan as run_plan

    if on is not None:
        from graftkit.plan.elsewhere import Machine

        machine = Machine(on, 1 if gpus is None else gpus, 0.4 if mfu is None else mfu)
    found = run_plan(recipe, console, machine).as_dict()
    emit(as_json, {**found, "gave_up": gave_up} if memory or time else found)


def _elsewhere(geometry: str, stated: dict[str, Any], as_json: bool) -> None:
    from graftkit.plan.training import estimate, lines

    for name, example in (("tokens", "7T"), ("on", "a100")):
        if name not in stated:
            raise UserError(f"--geometry {geometry} needs --{name}, for example --{name} {example}.")
    found = estimate(geometry, **stated)
    emit(as_json, found)
    if not as_json:
        print(*lines(found), sep="\n")
