"""Text classification and regression: one text or a pair of texts; one label, a set of labels, a level of an ordered
scale, or a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.data.columns import Column
from graftkit.data.read import Table
from graftkit.errors import UserError, listing
from graftkit.recipe.catalogue import option
from graftkit.tasks.base import Dataset, Examples, Learn
from graftkit.tasks.classify.form import Form, OneLabel, Ordinal
from graftkit.tasks.classify.multi import ManyLabels
from graftkit.tasks.classify.number import Number, units_of
from graftkit.tasks.explained import Aim
from graftkit.tasks.shared.labels import LABEL, label_text
from graftkit.tasks.shared.texts import FIRST, SECOND, TEXT, TextTask, encode, read_texts
from graftkit.tasks.shared.weights import check_class_weights

TINY = 1e-12  # of a threshold
BELONGS = {  # options of some kinds of answers, and those kinds
    "class_weights": ("single", "multi", "ordinal"),
    "order": ("ordinal",),
    "threshold": ("multi",),
    "separator": ("multi",),
    "indicators": ("multi",),
    "center": ("regression",),
    "scale": ("regression",),
}


@dataclass(frozen=True)
class Classify(TextTask):
    """One of several labels, a set of labels, a level of an ordered scale, or a number, for a text or a pair of texts.

    `kind='single'`: one of several labels, trained with cross-entropy. `kind='multi'`: a set of labels, possibly empty,
    with binary cross-entropy for each label; the column holds lists or separated texts, or `indicators` names columns of
    0 and 1, or the positions in one column of such vectors. `kind='ordinal'`: ordered labels, with the conditional
    probability of exceeding each (Shi, Cao and Raschka 2021). `kind='regression'`: a number, with squared error in units
    of the training rows' standard deviation.
    """

    aliases: ClassVar[tuple[str, ...]] = (
        "text_classification",
        "sequence_classification",
        "sentiment_analysis",
    )
    meant: ClassVar[Mapping[str, str]] = {
        "regression": "classify(kind='regression')",
        "multi_label": "classify(kind='multi')",
        "multilabel": "classify(kind='multi')",
        "ordinal": "classify(kind='ordinal')",
    }
    one_answer: ClassVar[bool] = True
    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", (*FIRST, *TEXT), "text"),
        Column("text_pair", SECOND, "text", required=False),
        Column("label", LABEL, "label"),
    )

    explains: ClassVar[bool] = True

    kind: str = option("single", "what an answer is", choices=("single", "multi", "ordinal", "regression"))
    class_weights: str | dict | None = option(
        None,
        "'balanced' weights rows inversely to the frequency of their class; or a weight per class, {label: weight}; "
        "multi: weights of positive targets",
        choices=("balanced",),
    )
    order: tuple | None = option(None, "ordinal: the labels from lowest to highest; null: numeric order")
    threshold: float | None = option(
        None, "multi: predict labels above this probability; null means 0.5", above=0, below=1
    )
    separator: str | None = option(None, "multi: separator of labels in a text; null: any of ; | ,")
    indicators: tuple | None = option(
        None,
        "multi: columns of 0 and 1, one for each label; or the labels of the positions in one column of such vectors",
    )
    center: float | None = option(
        None, "regression: subtracted from the targets; null: the training rows' mean"
    )
    scale: float | None = option(
        None, "regression: targets are divided by it; null: the training rows' standard deviation", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kinds in BELONGS.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                allowed = " or ".join(f"kind={kind!r}" for kind in kinds)
                raise UserError(f"classify(): {name} is for {allowed}, but kind is {self.kind!r}.")
        _check_list("order", self.order)
        _check_list("indicators", self.indicators)
        if self.separator is not None and not self.separator.strip(" "):
            raise UserError("classify(): separator is empty; set it to the text between labels, such as ';'.")
        # these depend on the kind; in all other tasks they are class attributes
        object.__setattr__(self, "headline", self.form.headline)
        object.__setattr__(self, "directions", self.form.directions)
        object.__setattr__(self, "calibrates", self.form.calibrates)
        object.__setattr__(self, "columns", self._columns())
        object.__setattr__(self, "using", ("threshold",) if self.kind == "multi" else ())

    def _columns(self) -> tuple[Column, ...]:
        texts = tuple(column for column in type(self).columns if column.kind == "text")
        return (*texts, Column("label", self.form.aliases, "label", required=self.indicators is None))

    @cached_property
    def form(self) -> Form:
        """The implementation of this kind of answer."""
        if self.kind == "multi":
            threshold = 0.5 if self.threshold is None else self.threshold
            return ManyLabels(threshold, self.separator, self.indicators, self.class_weights)
        if self.kind == "regression":
            return Number(self.center, self.scale)
        return (
            Ordinal(self.order, self.class_weights)
            if self.kind == "ordinal"
            else OneLabel(self.class_weights)
        )

    def used(self, columns: dict[str, str], named: Mapping[str, str], table: Table) -> dict[str, str]:
        """Drop the label column if each label has its own column."""
        if self.indicators is None or not set(self.indicators) & set(table.columns):
            return columns
        return {name: column for name, column in columns.items() if name != "label"}

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        names = self.form.label_names(table, columns, skip_bad)
        check_class_weights(self.class_weights, names, self.name)
        return names

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        wrong = self.form.wrong(table, columns, labels) if targets else None
        kept, values, skipped = read_texts(table, columns, wrong, skip_bad)
        return Examples(kept, values, self.form.numbers(kept, columns, labels) if targets else None, skipped)

    def hold_out(self, examples: Examples, share: float, seed: int) -> tuple[list[int], list[int]]:
        return self.form.hold_out(examples, share, seed)

    def resolve(self, examples: Examples, labels: Sequence[str], seed: int) -> Classify:
        """Store the mean and standard deviation of a regression's targets, which scale its outputs back."""
        if self.kind != "regression" or None not in (self.center, self.scale):
            return self
        center, scale = units_of(examples)
        return replace(
            self,
            center=center if self.center is None else self.center,
            scale=scale if self.scale is None else self.scale,
        )

    def scaled(self, temperature: float) -> Classify:
        """Return the task with the threshold of probabilities moved as they are."""
        if self.threshold is None:
            return self
        odds = (self.threshold / (1 - self.threshold)) ** (1 / temperature)
        return replace(self, threshold=min(max(odds / (1 + odds), TINY), 1 - TINY))

    def outputs(self, labels: Sequence[str]) -> int:
        return self.form.outputs(labels)

    def output_names(self, labels: Sequence[str]) -> Sequence[str]:
        return self.form.output_names(labels)

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        targets = examples.targets
        return encode(self, examples, backbone, max_length, None if targets is None else np.asarray(targets))

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        return self.form.learner(dataset, labels, label_smoothing)

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        return self.form.metrics(outcomes, dataset, labels, intervals)

    def by_row(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> dict[str, np.ndarray]:
        return self.form.by_row(outcomes, dataset, labels)

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        return self.form.answers(outcomes, dataset, labels)

    def graded(self, outputs: Tensor) -> Tensor:
        return self.form.graded(outputs)

    def aim(
        self, dataset: Dataset, outputs: Callable[[int], Tensor], labels: Sequence[str], label: str | None,
        word: str | None,
    ) -> Aim:  # fmt: skip
        return self.form.aim(dataset, outputs, labels, label, word)

    def line(self, answer: dict[str, Any]) -> str:
        return self.form.line(answer)

    def worst(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        return self.form.worst(outcomes, dataset, labels, count)

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        return self.form.statistics(dataset, labels)

    def plain(self, labels: Sequence[str]) -> dict[str, Any]:
        return self.form.plain(labels)


def _check_list(name: str, given: Sequence[Any] | None) -> None:
    """Raise `UserError` unless a list has at least two names, without duplicates."""
    if given is None:
        return
    names = [label_text(value) for value in given]
    if len(names) < 2:
        raise UserError(
            f"classify(): {name} has {len(names)} name{'s' * (len(names) != 1)}; at least two are needed."
        )
    twice = [label for label in dict.fromkeys(names) if names.count(label) > 1]
    if twice:
        raise UserError(f"classify(): {name} lists {listing(map(repr, twice))} more than once.")
