"""Commands for finished runs and grafts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from graftkit.cli.options import Json, RunFolder, console_of, emit, flush_output
from graftkit.errors import UserError

Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="KEY=VALUE", help="override an option of the task, for example temperature=0.7"
    ),
]

Moved = Annotated[
    str | None,
    typer.Option("--model", help="new location of the run's model, if it has moved: a folder or hub id"),
]


def _options(given: list[str] | None) -> dict[str, Any]:
    from graftkit.recipe.values import override

    return override({}, given or [], what="an option of a task", example="temperature=0.7")


def evaluate(
    run: RunFolder,
    data: Annotated[str, typer.Option(help="labelled rows")],
    option: Options = None,
    model: Moved = None,
    report: Annotated[Path | None, typer.Option(help="write a report of these rows to an HTML file")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run on labelled rows."""
    refuse_empty(data)
    if report is not None:
        from graftkit.report.making import check_path

        check_path(report)  # before torch is loaded
    from graftkit.runs.predict import evaluate as run_evaluate

    found = run_evaluate(run, data, _options(option), model=model, report=report)
    if as_json:
        emit(True, found)
        return
    from graftkit.report.summary import show_metrics

    show_metrics(console_of(False), found, found["headline"])


def refuse_empty(data: str | None) -> None:
    """Raise `UserError` if the name of the data file is empty."""
    if data is not None and not data.strip():
        raise UserError("--data is empty; name a data file.")


def predict(
    run: RunFolder,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT ...]", help="texts to predict for")
    ] = None,
    data: Annotated[str | None, typer.Option(help="a file of rows to predict for")] = None,
    out: Annotated[
        Path | None, typer.Option(help="write the answers to a file: .jsonl, .csv, .tsv or .parquet")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the output file if it exists")] = False,
    option: Options = None,
    model: Moved = None,
    coverage: Annotated[
        float | None,
        typer.Option(
            help="add the set of labels that holds the right one with this probability, such as 0.95"
        ),
    ] = None,
    stream: Annotated[
        bool | None, typer.Option(help="show a single answer as it is generated; default: only in a terminal")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict for texts or for the rows of a file, which may be larger than memory."""
    if bool(texts) == (data is not None):
        raise UserError("give either texts or --data FILE to predict.")
    refuse_empty(data)
    refuse_files(texts or [])
    given = data if data is not None else texts or []
    if out is not None:
        _predict_into(out, run, given, _options(option), overwrite, as_json, model=model, coverage=coverage)
        return
    from graftkit.runs.predict import Answers

    alone = texts is not None and len(texts) == 1 and not as_json
    show = _show if alone and (sys.stdout.isatty() if stream is None else stream) else None
    answers = Answers(run, given, _options(option), show=show, model=model, coverage=coverage)
    predictions = []
    for piece in answers.pieces():
        if as_json:
            predictions += piece
        else:
            print("" if answers.streamed else "\n".join(map(answers.line, piece)))
            flush_output()
    found = {"skipped": answers.skipped, "skipped_rows": answers.skipped_rows}
    _tell_skipped(found)
    emit(as_json, {"run": str(run), "predictions": predictions, **found})


def _predict_into(
    out: Path, run: Path, given: str | list[str], options: dict[str, Any], overwrite: bool, as_json: bool, **more: Any
) -> None:  # fmt: skip
    """Write the answers to a file."""
    from graftkit.report.table import check_path

    data = given if isinstance(given, str) else None
    check_path(out, data, overwrite)  # before torch is loaded
    from graftkit.data.stream import told_of_size
    from graftkit.runs.predict import predict_into

    if note := told_of_size(data):
        print(note, file=sys.stderr)
    done = predict_into(run, given, out, options, overwrite=overwrite, tell=_progress(as_json), **more)
    _tell_skipped(done)
    emit(as_json, {"run": str(run), **done})
    if not as_json:
        print(f"{done['rows']} answers are in {out}", file=sys.stderr)


def calibrate(
    run: RunFolder,
    data: Annotated[str, typer.Option(help="labelled rows that the run was not trained on")],
    known: Annotated[float, typer.Option(help="share of these rows that is to be known")] = 0.95,
    model: Moved = None,
    as_json: Json = False,
) -> None:
    """Fit a run's probabilities, sets of labels and what it does not know on labelled rows."""
    refuse_empty(data)
    from graftkit.runs.calibrate import calibrate as run_calibrate

    found = run_calibrate(run, data, known=known, model=model)
    emit(as_json, found)
    if not as_json:
        from graftkit.report.summary import confidence_lines

        console_of(False).pairs(confidence_lines(found))


def refuse_files(texts: list[str]) -> None:
    """Raise `UserError` for the name of a table where a text should be: its name would be answered, not its rows."""
    from graftkit.data.table import SUFFIXES

    for text in texts:
        if Path(text).suffix.lower() in SUFFIXES and not any(map(str.isspace, text)):
            raise UserError(
                f"{text!r} is the name of a file, not a text. To predict for its rows: --data {text}"
            )


def _tell_skipped(found: dict[str, Any]) -> None:
    if found["skipped"]:
        print(
            f"{found['skipped']} bad rows were skipped:",
            *found["skipped_rows"][:20],
            sep="\n",
            file=sys.stderr,
        )


def _progress(as_json: bool) -> Callable[[int], None] | None:
    """Return a function that redraws the number of answers in a terminal."""
    if as_json or not sys.stderr.isatty():
        return None
    return lambda count: print(f"\r{count:,} answers", end="\r", file=sys.stderr, flush=True)


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def merge(
    grafts: Annotated[list[Path], typer.Argument(metavar="GRAFT", help="LoRA grafts: folders of grafts, runs or PEFT")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    weights: Annotated[str | None, typer.Option(help="one for each graft, as in 0.7,0.3; default: equal weights")] = None,
    how: Annotated[str, typer.Option(help="cat, svd, linear, ties, dare, magnitude, or combinations such as ties-svd")] = "cat",
    density: Annotated[float | None, typer.Option(help="fraction of values kept by ties, dare and magnitude")] = None,
    rank: Annotated[int | None, typer.Option(help="rank of the result of svd; default: the largest of the grafts")] = None,
    heads: Annotated[str, typer.Option(help="mean (by weight), first or none")] = "mean",
    sign: Annotated[str, typer.Option(help="how ties elects signs: total (by sum) or frequency")] = "total",
    seed: Annotated[int, typer.Option(help="seed of dare")] = 0,
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Merge several LoRA grafts into one, without loading their model.

    cat gives the exact weighted sum, with the sum of all ranks; svd gives its best approximation of a lower rank.
    """
    from graftkit.grafts.merge import merge as run_merge

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
        raise UserError(f"--weights is {text!r}; write numbers separated by commas: 0.7,0.3.") from None


def export(
    run: RunFolder, to: Annotated[Path, typer.Option(help="folder to write")],
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it holds a model")] = False,
    model: Moved = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Write a run as a plain model: the graft folded in, compared with the run on real rows."""
    from graftkit.runs.export import export as run_export

    done = run_export(run, to, overwrite=overwrite, model=model)
    emit(as_json, done)
    if not as_json:
        print(f"written: {done['to']} ({', '.join(done['files'])})")
        which = "rows" if done["rows_real"] else "made-up rows (no data file of the run could be read)"
        print(
            f"compared on {done['rows_compared']} {which}: largest difference of a logit {done['largest_difference']:.2g}"
        )
        print(f"load it with: {done['load_with']}")
