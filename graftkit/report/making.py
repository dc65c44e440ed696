"""Make the report of finished runs: `graftkit report`."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftkit.errors import UserError
from graftkit.files import write_text
from graftkit.report.finished import REPORT, Finished, fitting, interval_of, read_finished
from graftkit.report.html import MADE_BY
from graftkit.report.page import run_page
from graftkit.report.several import several_page


def make_report(*runs: str | Path, out: str | Path | None = None, open: bool = False) -> dict[str, Any]:
    """Write the report of finished runs as one HTML file: `graftkit report` in Python.

    For one run it is `RUN/report.html`, or `out`; several runs of one task are compared, and `out` has to be named. `open`:
    show it in a browser. The result has the `report` (its path), its `bytes`, and the `runs`, each with its `metric`, `value`
    and `interval`. Raises `UserError` for a folder that holds no finished run, runs of different tasks, or if `out` is a
    file that is no report.
    """
    if not runs:
        raise UserError("name at least one run folder.")
    if out is None and len(runs) > 1:
        raise UserError(
            "a report of several runs needs a file to write: --out FILE.html, or out=... in Python."
        )
    folders = list(dict.fromkeys(Path(run).expanduser() for run in runs))
    path = folders[0] / REPORT if out is None else Path(out).expanduser()
    if out is not None:
        check_path(path)
    found = [read_finished(folder) for folder in folders]
    size = _write(path, found)
    if open:
        webbrowser.open(path.absolute().as_uri())
    return {"report": str(path), "bytes": size, "runs": [_told(run) for run in found]}


def write_report(folder: Path) -> None:
    """Write the report of a run into its folder."""
    _write(folder / REPORT, [read_finished(folder)])


def report_of_rows(
    folder: Path, metrics: dict[str, Any], worst: list[dict[str, Any]], previews: list[dict[str, str]], data: str,
    out: Path,
) -> str:  # fmt: skip
    """Write the report of a run on rows that it was evaluated on later, and return its path. `data`: what they are called."""
    run = read_finished(folder)
    log = [line for line in run.log if line.get("kind") != "final"]
    result = run.result | {"metrics": metrics, "evaluated_on": data}
    run = replace(run, result=result, log=log, worst=worst, previews=fitting(previews, len(worst)))
    _write(out, [run])
    return str(out)


def _write(path: Path, runs: Sequence[Finished]) -> int:
    text = run_page(runs[0]) if len(runs) == 1 else several_page(runs)
    write_text(path, text)
    return len(text.encode("utf-8"))


def _told(run: Finished) -> dict[str, Any]:
    metric = run.headline[0]
    interval = interval_of(run.metrics, metric)
    return {
        "run": str(run.folder), "task": run.task, "method": run.result.get("method"), "metric": metric,
        "value": run.metrics.get(metric), "interval": None if interval is None else list(interval),
    }  # fmt: skip


def check_path(path: Path) -> None:
    """Raise `UserError` unless a report may be written to `path`: it is new, or an older report."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"the report {path.name!r} is an HTML file; use a name that ends in .html.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file.")
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            if MADE_BY not in file.read(2000):
                raise UserError(f"{path} exists and is not a report of GraftKit; name another file.")
