"""Rows that occur more than once: within one part of the data, or in two of them, where they leak."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.tasks.base import Examples, Task

SHOWN = 3  # rows that a warning names
PARTS = {"train": "training", "eval": "evaluation", "test": "test"}


@dataclass(frozen=True)
class Pair:
    """A row and an earlier one that it repeats. `data`, `row`: where the row is; `other`, `other_row`: the earlier one.

    `similarity`: 1 for rows that are equal; otherwise the cosine of their features. `same`: whether both have the same
    answer; None if one is unknown.
    """

    data: str
    row: int
    other: str
    other_row: int
    similarity: float
    exact: bool
    same: bool | None


def repeated(task: Task, parts: Mapping[str, Examples], labels: Sequence[str]) -> list[Pair]:
    """Return the rows of all parts whose inputs equal those of an earlier row, in order, each with the first such row.

    Texts are compared word by word, without regard to blanks between them; images and recordings by their bytes.
    """
    first: dict[bytes, tuple[str, int, Any]] = {}
    found = []
    for name, examples in parts.items():
        answers = answers_of(task, examples, labels)
        for row, key in enumerate(inputs_of(task, examples)):
            there = first.setdefault(key, (name, row, answers[row]))
            if there[:2] != (name, row):
                same = None if answers[row] is None or there[2] is None else answers[row] == there[2]
                found.append(Pair(name, row, there[0], there[1], 1.0, True, same))
    return found


def leak_warnings(parts: Mapping[str, Examples], pairs: Sequence[Pair]) -> list[str]:
    """Return a warning for each pair of parts that have rows in common. `pairs`: those of `repeated`."""
    shared: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for pair in pairs:
        if pair.data != pair.other:
            shared.setdefault((pair.other, pair.data), []).append((pair.other_row, pair.row))
    return [_warning(parts, before, name, rows) for (before, name), rows in shared.items()]


def two_answers(parts: Mapping[str, Examples], pairs: Sequence[Pair]) -> list[str]:
    """Return a warning if training rows repeat an earlier one with another answer: one of both is wrong."""
    found = [pair for pair in pairs if pair.data == pair.other == "train" and pair.same is False]
    if not found:
        return []
    places = [
        f"{_short(parts['train'].where(pair.row))} = {_short(parts['train'].where(pair.other_row))}"
        for pair in found[:SHOWN]
    ]
    more = f"; and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    are = "rows repeat an earlier one" if len(found) > 1 else "row repeats an earlier one"
    return [
        f"{len(found):,} training {are} with another answer, so one of both is wrong ({'; '.join(places)}{more}); "
        "`graftkit data check` lists all."
    ]


def _warning(parts: Mapping[str, Examples], before: str, name: str, rows: Sequence[tuple[int, int]]) -> str:
    count, total = len(rows), len(parts[name])
    places = [
        f"{_short(parts[name].where(row))} = {_short(parts[before].where(first))}"
        for first, row in rows[:SHOWN]
    ]
    more = f"; and {count - SHOWN:,} more" if count > SHOWN else ""
    are = "are" if count > 1 else "is"
    remedy = f"Remove {'them' if count > 1 else 'it'} from one of both"
    if parts[name].table.source == parts[before].table.source:
        remedy = "Remove the duplicates"  # one file, part of which is held out
    return (
        f"LEAK: {count:,} of {total:,} {PARTS[name]} rows {are} also among the {PARTS[before]} rows, so the metrics on the "
        f"{PARTS[name]} rows are too good ({'; '.join(places)}{more}). {remedy}; `graftkit data check` lists all."
    )


def _short(where: str) -> str:
    """Return the place of a row without the folders of its file."""
    return where.replace("\\", "/").rpartition("/")[2]


def inputs_of(task: Task, examples: Examples) -> list[bytes]:
    """Return a digest of the inputs of each row, (rows,); empty if the task has no inputs apart from its answers."""
    names = [column.name for column in task.columns]
    names = [name for name in names if name in examples.values and name not in task.labelled]
    columns = [examples.values[name] for name in names]
    if not columns:
        return []
    return [digest([column[row] for column in columns]) for row in range(len(examples))]


def answers_of(task: Task, examples: Examples, labels: Sequence[str]) -> list[Any]:
    """Return the target of each row: a label, or a digest of anything longer; None if it is unknown."""
    targets = examples.targets
    if targets is not None:
        if are_labels(targets) and labels:
            return [labels[target] for target in targets]
        return [digest(target) for target in targets]
    columns = [examples.values[name] for name in task.labelled if name in examples.values]
    return [digest([column[row] for column in columns]) if columns else None for row in range(len(examples))]


def are_labels(targets: Any) -> bool:
    """Return whether each row has one label, as its number."""
    return isinstance(targets, np.ndarray) and targets.ndim == 1 and targets.dtype.kind == "i"


def digest(value: Any) -> bytes:
    """Return a digest of a value of any kind; blanks between words are all the same."""
    return hashlib.blake2b(b"".join(_parts(value)), digest_size=16).digest()


def _parts(value: Any) -> Sequence[bytes]:
    if isinstance(value, str):
        return [" ".join(value.split()).encode("utf-8", "surrogatepass"), b"\0"]
    if isinstance(value, bytes):
        return [value, b"\1"]
    if isinstance(value, np.ndarray):
        return [str(value.shape).encode(), value.tobytes()]
    if isinstance(value, Mapping):
        return [part for key, inner in value.items() for part in (*_parts(key), *_parts(inner))]
    if isinstance(value, list | tuple):
        return [b"(", *(part for inner in value for part in _parts(inner)), b")"]
    known = getattr(value, "digest", None)  # of an image or a sound
    return [known] if isinstance(known, bytes) else [repr(value).encode("utf-8", "replace"), b"\0"]
