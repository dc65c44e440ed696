"""The command that makes reports of finished runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from graftkit.cli.options import Json, emit


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders; several are compared")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default for one run: RUN/report.html")
    ] = None,
    open: Annotated[bool, typer.Option("--open", help="show the report in a browser")] = False,
    as_json: Json = False,
) -> None:
    """Make the report of a finished run, or compare several runs of one task, as one HTML file."""
    from graftkit.report.making import make_report as make

    done = make(*runs, out=out, open=open)
    emit(as_json, done)
    if not as_json:
        print(f"the report is in {done['report']}", file=sys.stderr)
