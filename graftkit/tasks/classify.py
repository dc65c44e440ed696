"""Text classification: one text or a pair of texts, one answer of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.catalogue import option
from graftkit.data.columns import Column
from graftkit.data.read import Table
from graftkit.tasks.base import Dataset, Examples, check_rows
from graftkit.tasks.labels import (
    LABEL,
    LabelIndex,
    LabelTask,
    balanced,
    is_missing,
    label_problem,
    label_text,
)
from graftkit.tasks.texts import FIRST, SECOND, TEXT, TextTask, encode, text_problem


@dataclass(frozen=True)
class Classify(TextTask, LabelTask):
    """One answer of several for a text, or for a pair of texts."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", (*FIRST, *TEXT), "text"),
        Column("text_pair", SECOND, "text", required=False),
        Column("label", LABEL, "label"),
    )

    class_weights: str | None = option(
        None, "'balanced' weighs each row by the rarity of its class", choices=("balanced",)
    )

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        index = LabelIndex(labels)
        texts = [name for name in ("text", "text_pair") if name in columns]

        def problem(row: int) -> str | None:
            for name in texts:
                found = text_problem(table, columns[name], row)
                if found is not None:
                    return found
            if not targets:
                return None
            value = table.columns[columns["label"]][row]
            if is_missing(value):
                return f"{table.where(row)}: column {columns['label']!r} is empty."
            found = label_problem(value, index)
            return None if found is None else f"{table.where(row)}: {found}"

        kept, skipped = check_rows(table, problem, skip_bad)
        values: dict[str, list] = {
            name: [str(value) for value in kept.columns[columns[name]]] for name in texts
        }
        numbers = None
        if targets:
            found = [index.find(label_text(value)) for value in kept.columns[columns["label"]]]
            numbers = np.array(found, dtype=np.int64)
        return Examples(kept, values, numbers, skipped)

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        targets = examples.targets
        return encode(self, examples, backbone, max_length, None if targets is None else np.asarray(targets))

    def class_weight(self, counts: Counter[int], classes: int) -> Tensor | None:
        return None if self.class_weights is None else balanced(counts, classes)
