"""Experiment trackers by name (TensorBoard, Weights & Biases, MLflow, Trackio ...), using accelerate's classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from graftkit.errors import UserError, first_line, listing, nearest

PLACES = {
    "step": "train",
    "evaluation": "eval",
}  # prefix of the metrics in each kind of line of metrics.jsonl


def refuse_missing(names: Sequence[str]) -> None:
    """Raise `UserError` for a tracker that accelerate does not know, or whose package is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    classes, available = _classes(), set(map(str, get_available_trackers()))
    for name in names:
        if name not in classes:
            raise UserError(
                f"train.trackers: there is no tracker {name!r} (known: {listing(classes)}).{nearest(name, classes)}"
            )
        if name not in available:
            raise UserError(
                f"train.trackers names {name!r}, but its package is not installed: pip install {name}, or leave it out."
            )


def _classes() -> dict[str, Any]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return {str(name): tracker for name, tracker in LOGGER_TYPE_TO_CLASS.items()}


class Trackers:
    """The trackers of one run. A tracker that fails is reported once and then disabled; it never stops the run."""

    def __init__(
        self, names: Sequence[str], folder: Path, config: Mapping[str, Any], report: Callable[[str], None]
    ) -> None:
        self.report = report
        self.active: dict[str, Any] = {}
        for name in dict.fromkeys(names):
            self._try(name, partial(self._start, name, folder, config))

    def _start(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        kind = _classes()[name]
        given = (folder.name, str(folder / "trackers")) if kind.requires_logging_directory else (folder.name,)
        tracker = kind(*given)
        self.active[name] = tracker
        if hasattr(tracker, "start"):  # older versions of accelerate start in the constructor
            tracker.start()
        tracker.store_init_configuration(flat(config))

    def log(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Log the numbers in lines of metrics.jsonl, as train/loss, eval/accuracy, test/loss ..."""
        for line in lines if self.active else ():
            place = PLACES.get(line["kind"]) or line.get("data", line["kind"])
            aside = ("kind", "data", "step")
            figures = {
                f"{place}/{name}": value
                for name, value in line.items()
                if name not in aside and isinstance(value, int | float)
            }
            for name, tracker in list(self.active.items()):
                self._try(name, partial(tracker.log, figures, step=line["step"]))

    def finish(self) -> None:
        for name, tracker in list(self.active.items()):
            self._try(name, tracker.finish)
        self.active.clear()

    def _try(self, name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            self.active.pop(name, None)
            self.report(
                f"the tracker {name!r} failed and is now disabled: {type(error).__name__}: {first_line(error)}"
            )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted keys with numbers, strings and booleans, which all trackers accept."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
