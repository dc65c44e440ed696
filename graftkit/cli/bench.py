"""The command that measures a machine. No torch here."""

from __future__ import annotations

from typing import Annotated

import typer

from graftkit.cli.options import Json, MethodName, TaskName, console_of, emit


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="model folder, hub id, or package.module:function")],
    method: MethodName = None, task: TaskName = None,
    train: Annotated[str | None, typer.Option(help="rows to measure with; default: random texts")] = None,
    tokens: Annotated[int, typer.Option(min=8, help="tokens of a random text")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="rows in a batch")] = 8,
    precision: Annotated[str, typer.Option(help="train.precision")] = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure the training step of a method on this machine, and print a table to paste into an issue."""
    from graftkit.report.benchmark import show_bench
    from graftkit.runs.bench import bench as run_bench

    found = run_bench(
        model, method, task, train=train, tokens=tokens, batch_size=batch_size, precision=precision
    )
    if as_json:
        emit(True, found)
    else:
        show_bench(console_of(False), found)
