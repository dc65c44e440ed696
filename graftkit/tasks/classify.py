"""Text classification: one text or a pair of texts, one answer of several."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.catalogue import option
from graftkit.data.columns import Column
from graftkit.data.encode import encode_texts
from graftkit.data.read import Table
from graftkit.errors import UserError, listing, nearest
from graftkit.tasks.base import Dataset, Examples, Task
from graftkit.tasks.metrics import classification

TEXT = ("sentence", "content", "review", "question", "query", "utterance", "tweet", "comment", "document")
FIRST = ("text", "text1", "sentence1", "sentence_1", "premise", "question1")
SECOND = ("text2", "sentence2", "sentence_2", "hypothesis", "question2", "pair")
LABEL = ("category", "intent", "class", "target", "labels", "topic", "sentiment", "y")


@dataclass(frozen=True)
class Classify(Task):
    """One answer of several for a text, or for a pair of texts."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", (*FIRST, *TEXT), "text"),
        Column("text_pair", SECOND, "text", required=False),
        Column("label", LABEL, "label"),
    )

    class_weights: str | None = option(
        None, "'balanced' weighs each row by the rarity of its class", choices=("balanced",)
    )

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        values = [value for value in table.columns[columns["label"]] if not _missing(value)]
        names = sorted({_name(value) for value in values}, key=_natural)
        if not names:
            raise UserError(f"column {columns['label']!r} of {table.source} has no labels at all.")
        if len(names) == 1:
            raise UserError(
                f"column {columns['label']!r} of {table.source} has one class only ({names[0]!r}), so there is "
                "nothing to tell apart. Name another column with data.columns={label: ...}, or add rows."
            )
        if len(names) > max(20, len(values) // 2):
            raise UserError(
                f"column {columns['label']!r} of {table.source} has {len(names)} different values in {len(values)} "
                "rows, so it does not look like a label. Name the label column with data.columns={label: ...}."
            )
        return tuple(names)

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        index = _Index(labels)
        wanted: list[str] = [
            name
            for name in ("text", "text_pair", "label")
            if name in columns and (targets or name != "label")
        ]
        good, skipped = [], list(table.skipped)
        for row in range(len(table)):
            problem = self._problem(table, columns, wanted, row, index)
            if problem is None:
                good.append(row)
            elif skip_bad:
                skipped.append(problem)
            else:
                raise UserError(f"{problem} Mend it, or leave such rows out with data.skip_bad=true.")
        if not good:
            raise UserError(f"{table.source} has no good rows: {skipped[0]}")
        kept = table.take(good)
        pairs = [str(v) for v in kept.columns[columns["text_pair"]]] if "text_pair" in wanted else None
        numbers = (
            [index.find(_name(v)) for v in kept.columns[columns["label"]]] if "label" in wanted else None
        )
        return Examples(
            kept,
            [str(value) for value in kept.columns[columns["text"]]],
            pairs,
            None if numbers is None else np.array(numbers, dtype=np.int64),
            tuple(skipped),
        )

    def _problem(
        self, table: Table, columns: dict[str, str], wanted: list[str], row: int, index: _Index
    ) -> str | None:
        for name in wanted:
            value = table.columns[columns[name]][row]
            if _missing(value):
                return f"{table.where(row)}: column {columns[name]!r} is empty."
            if name != "label" and not isinstance(value, str | int | float):
                return (
                    f"{table.where(row)}: column {columns[name]!r} is a {type(value).__name__}, not a text."
                )
            if name == "label" and index.find(_name(value)) is None:
                labels = index.labels
                return (
                    f"{table.where(row)}: label {_name(value)!r} is not among the {len(labels)} labels of the "
                    f"training data ({listing(labels, 8)}).{nearest(_name(value), labels)}"
                )
        return None

    def dataset(self, examples: Examples, backbone: Backbone, max_length: int) -> Dataset:
        if backbone.processor is None:
            raise UserError(f"{backbone.source} has no tokenizer, which classify() needs.")
        return Dataset(examples, encode_texts(backbone.processor, examples.texts, examples.pairs, max_length))

    def weights(self, targets: np.ndarray, classes: int) -> Tensor | None:
        """Rows / (classes * rows of the class): mean 1 over the rows."""
        if self.class_weights is None:
            return None
        counts = Counter(targets.tolist())
        return torch.tensor([len(targets) / (len(counts) * counts.get(c, 1)) for c in range(classes)])

    def row_losses(
        self, logits: Tensor, targets: Tensor, label_smoothing: float, weights: Tensor | None
    ) -> Tensor:
        losses = torch.nn.functional.cross_entropy(
            logits.float(), targets, reduction="none", label_smoothing=label_smoothing
        )
        return losses if weights is None else losses * weights.to(losses.device)[targets]

    def metrics(self, logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
        return classification(logits, targets, labels)

    def answers(self, logits: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
        """The likeliest label of each row and its probability."""
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        best = probabilities.argmax(axis=1)
        return [
            {"label": labels[b], "probability": round(float(p[b]), 4)} for b, p in zip(best, probabilities)
        ]


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or not str(value).strip()


def _name(value: Any) -> str:
    """A label as text: 3, 3.0 and '3' are one label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


class _Index:
    """The place of a label. One that is written otherwise in another kind of file ('1.0' in CSV and 1 in Parquet,
    'true' and True) is found where only one label can be meant."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = labels
        self._places = {label: i for i, label in enumerate(labels)}
        forms = Counter(map(_normal, labels))
        self._normal = {_normal(label): i for i, label in enumerate(labels) if forms[_normal(label)] == 1}

    def find(self, name: str) -> int | None:
        place = self._places.get(name)
        return self._normal.get(_normal(name)) if place is None else place


def _normal(name: str) -> str:
    if re.fullmatch(r"-?\d+\.0+", name):
        return name.partition(".")[0]
    return name.lower() if name.lower() in ("true", "false") else name


def _natural(name: str) -> tuple[int, float, str]:
    """Numbers in their order, then texts; 'nan' and 'inf' are texts, for nan has no place in an order."""
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (0, number, name) if math.isfinite(number) else (1, 0.0, name)
