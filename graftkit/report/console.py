"""Terminal output. No torch here; with `--json` all of it goes to standard error."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO, cast

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from graftkit.report.streams import Lenient

LINE_SECONDS = 10.0  # between progress lines if there is no terminal to redraw one


def count(number: float) -> str:
    """Format a count: 73728 -> '73,728'."""
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Format bytes with a unit: 1234567 -> '1.2 MB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


def rows_of(rows: object, tokens: float | None = None) -> str:
    """Return the size of a step: `rows` as text, and with train.batch_tokens the most tokens."""
    return f"{rows} rows" if tokens is None else f"about {rows} rows (at most {count(tokens)} tokens)"


def duration(seconds: float) -> str:
    """Format seconds as '8 s', '2 min 5 s' or '1 h 4 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Console:
    """Prints lines and tables, and one progress line that is redrawn in a terminal."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        stream = sys.stderr if json else sys.stdout
        terminal = stream.isatty()
        self.rich = RichConsole(
            file=cast(TextIO, Lenient(stream)), quiet=quiet, highlight=False, soft_wrap=True, width=None if terminal else 110,
            markup=False, emoji=False,  # labels and paths are shown verbatim
        )  # fmt: skip
        self._progress: Progress | None = None
        self._task: Any = None
        self._started = self._last = 0.0
        self._rows = 0

    def quiet_unless(self, speaks: bool) -> None:
        """Print nothing from here on unless `speaks`: only one of several processes should print."""
        self.rich.quiet = self.rich.quiet or not speaks

    def line(self, text: str = "") -> None:
        self.rich.print(text)

    def heading(self, text: str) -> None:
        self.rich.print(f"\n{text}", style="bold")

    def pairs(self, rows: list[tuple[str, str]]) -> None:
        """Print names on the left and values on the right."""
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.rich.print(f"  {name:<{width}}  {value}")

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i, column in enumerate(columns):
            numeric = bool(rows) and all(
                row[i].replace(",", "").replace(".", "").replace("%", "").isdigit() for row in rows
            )
            table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.rich.print(table)

    def start(self, total: int, done: int) -> None:
        """Start the progress line of a training run."""
        self._started = self._last = time.monotonic()
        self._rows, self._first = 0, done
        if self.rich.is_terminal:
            columns = (TextColumn("training"), BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self.rich, transient=False)
            self._task = self._progress.add_task("", total=total, completed=done)
            self._progress.start()

    def step(
        self, number: int, total: int, epoch: float, loss: float, accuracy: float | None, rows: int,
        left: float | None = None,
    ) -> None:  # fmt: skip
        """Update the progress line after an optimizer step; loss and accuracy are smoothed. `left`: the seconds that are left;
        otherwise those of the steps so far."""
        self._rows += rows
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        if left is None:
            left = elapsed / max(1, number - self._first) * (total - number)
        right = "" if accuracy is None else f"accuracy {accuracy:.3f}  "
        text = (
            f"step {number}/{total}  epoch {epoch:.2f}  loss {loss:.3f}  {right}"
            f"{self._rows / elapsed:.0f} rows/s  {duration(left)} left"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=number, description=text)
        elif now - self._last >= LINE_SECONDS or number == total:
            self._last = now
            self.line(text)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
