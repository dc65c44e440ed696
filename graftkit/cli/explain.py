"""The command that explains answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from graftkit.cli.options import Json, RunFolder, console_of, emit
from graftkit.cli.runs import Moved, refuse_empty, refuse_files
from graftkit.errors import UserError


def explain(
    run: RunFolder,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT ...]", help="texts, images or sounds to explain the answers to")
    ] = None,
    data: Annotated[str | None, typer.Option(help="a file of rows")] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="3,5", help="rows of the file, as `predict` numbers them; default: all, at most 50")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="integrated_gradients, gradient_x_input, grad_cam or attention; default: what fits the model"),
    ] = None,
    steps: Annotated[int, typer.Option(help="steps of integrated_gradients")] = 50,
    label: Annotated[str | None, typer.Option(help="explain this label instead of the answer")] = None,
    word: Annotated[str | None, typer.Option(help="explain the tag of this word")] = None,
    nearest: Annotated[int, typer.Option(help="number of nearest training rows to show, 0 to 3")] = 3,
    html: Annotated[Path | None, typer.Option(help="write a page to an HTML file")] = None,
    overlay: Annotated[Path | None, typer.Option(help="write the marked image to a PNG file")] = None,
    model: Moved = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show which parts of an input an answer comes from, checked by deleting them."""
    if bool(texts) == (data is not None):
        raise UserError("give either texts or --data FILE to explain.")
    refuse_empty(data)
    refuse_files(texts or [])
    chosen = None if rows is None else _numbers(rows)
    from graftkit.runs.explain import explain as run_explain

    found = run_explain(
        run, data if data is not None else texts, rows=chosen, method=method, steps=steps, label=label, word=word,
        nearest=nearest, html=html, overlay=overlay, model=model,
    )  # fmt: skip
    if as_json:
        alone = found[0] if len(found) == 1 else {}
        emit(True, {"run": str(run), **alone, "explanations": found})
        return
    from graftkit.report.explained import show_explanations

    show_explanations(console_of(False), found)
    for path in (html, overlay):
        if path is not None:
            print(f"written: {path}", file=sys.stderr)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--rows is {text!r}; write row numbers separated by commas: 3,5.") from None
