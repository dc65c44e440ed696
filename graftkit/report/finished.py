"""Read the files of a finished run that its report is made of. No torch here; nothing of the run is loaded."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graftkit.errors import UserError
from graftkit.files import read_json, refuse_irregular
from graftkit.recipe.values import read as read_recipe

RECIPE, PLAN, METRICS, RESULT, WORST, PREVIEWS, REPORT, LR_FIND = (
    "recipe.yaml",
    "plan.json",
    "metrics.jsonl",
    "result.json",
    "worst.jsonl",
    "previews.json",
    "report.html",
    "lr-find.json",
)
LARGEST = 2**28  # bytes of a log
ROOM = 1_200_000  # characters of pictures and sounds in one page
PREVIEW = re.compile(r"data:(image/(jpeg|png)|audio/wav);base64,[A-Za-z0-9+/=]+")


@dataclass(frozen=True)
class Finished:
    """What a finished run wrote about itself.

    `recipe`, `plan`: empty if the run stored none. `log`: the lines of its metrics. `worst`: its worst examples, with
    pictures and sounds of each in `previews`. `lr_find`: the curve of its learning-rate range test, if it made one.
    """

    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    result: dict[str, Any]
    plan: dict[str, Any]
    log: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    previews: list[dict[str, str]]
    lr_find: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def task(self) -> str:
        """The task's expression, as in `classify(kind='multi')`."""
        return str(self.result.get("task") or self.recipe.get("task") or "task")

    @property
    def task_name(self) -> str:
        return self.task.partition("(")[0].strip()

    @property
    def metrics(self) -> dict[str, Any]:
        return self.result["metrics"]

    @cached_property
    def found(self) -> dict[str, dict[str, Any]]:
        """The final metrics of each data split: test, eval."""
        lines = {str(line.get("data")): line for line in self.log if line.get("kind") == "final"}
        return lines or ({"rows": self.metrics} if self.metrics else {})

    @cached_property
    def headline(self) -> list[str]:
        """The names of the metrics that are shown first."""
        named = self.result.get("headline")
        names = [str(name) for name in named] if isinstance(named, list) else []
        if not names:  # runs of earlier versions did not store them
            names = [n.removesuffix("_interval") for n in self.metrics if n.endswith("_interval")] or ["loss"]
        return [name for name in names if number(self.metrics.get(name)) is not None] or names[:1]

    def steps(self, key: str) -> list[tuple[Any, Any]]:
        return [
            (line.get("step"), line[key]) for line in self.log if line.get("kind") == "step" and key in line
        ]

    def evaluations(self, key: str) -> list[tuple[Any, Any]]:
        return [
            (line.get("step"), line[key])
            for line in self.log
            if line.get("kind") == "evaluation" and key in line
        ]

    @property
    def data(self) -> dict[str, Any]:
        return mapping(self.recipe.get("data"))

    def split(self) -> str:
        """The name of the data split that the metrics are of."""
        return "test" if "test" in self.found else "evaluation"


def number(value: Any) -> float | None:
    """Return a value if it is a number, else None. NaN is one."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def interval_of(metrics: dict[str, Any], name: str) -> tuple[float, float] | None:
    """Return the interval of a metric, if it has one of two finite numbers."""
    ends = metrics.get(f"{name}_interval")
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = map(number, ends)
    return None if low is None or high is None or not math.isfinite(low + high) else (low, high)


def not_a_run(folder: Path) -> UserError:
    """Return the error for a folder that is there and holds no run."""
    for kind, name in (("compare", "comparison"), ("curve", "learning curve")):
        if (folder / f"{kind}.json").is_file():
            return UserError(
                f"{str(folder)!r} holds a {name}, whose report is {REPORT} there; name one of its runs, in {folder / 'runs'}."
            )
    return UserError(f"{str(folder)!r} is not a run folder (it has no {RECIPE}).")


def read_finished(folder: Path) -> Finished:
    """Return what a finished run wrote. Raises `UserError` if the folder holds none, or one that is not finished or damaged."""
    if not folder.is_dir():
        raise UserError(f"run folder {str(folder)!r} does not exist.")
    if not (folder / RECIPE).is_file():
        raise not_a_run(folder)
    if not (folder / RESULT).is_file():
        raise UserError(
            f"the run in {folder} is not finished; resume it with `graftkit tune --resume {folder}`."
        )
    result = read_json(folder / RESULT)
    if not isinstance(result.get("metrics"), dict):
        raise UserError(
            f"{folder / RESULT}: metrics is missing or not an object; restore the file from a copy."
        )
    recipe_text = (folder / RECIPE).read_text(encoding="utf-8", errors="replace")
    worst = _lines(folder / WORST)
    return Finished(
        folder=folder,
        recipe_text=recipe_text,
        recipe=read_recipe(folder / RECIPE),
        result=result,
        plan=read_json(folder / PLAN) if (folder / PLAN).is_file() else {},
        lr_find=read_json(folder / LR_FIND) if (folder / LR_FIND).is_file() else {},
        log=_lines(folder / METRICS),
        worst=worst,
        previews=fitting(
            read_json(folder / PREVIEWS, list) if (folder / PREVIEWS).is_file() else [], len(worst)
        ),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; empty if there is none. A last line that was cut short is left out."""
    refuse_irregular(path)
    if not path.is_file():
        return []
    if path.stat().st_size > LARGEST:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, too many for a log; restore it from a copy."
        )
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if place >= len(lines) - 1:
                continue
            raise UserError(f"{path}, line {place} is not JSON; restore the file from a copy.") from None
        if isinstance(value, dict):
            found.append(value)
    return found


def fitting(stored: list[Any], rows: int) -> list[dict[str, str]]:
    """Return pictures and sounds for each of the worst examples, as many as there is room for in a page."""
    found: list[dict[str, str]] = []
    room = ROOM
    for given in stored[:rows]:
        whole = {
            kind: uri for kind, uri in mapping(given).items()
            if isinstance(uri, str) and len(uri) <= room and PREVIEW.fullmatch(uri)
        }  # fmt: skip
        size = sum(map(len, whole.values()))
        found.append(whole if size <= room else {})
        room -= size if size <= room else 0
    return found + [{}] * (rows - len(found))
