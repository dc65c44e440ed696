"""What a task is: which columns, how rows become tensors, which loss and metrics, how outputs become answers.

A task is put together of four parts, each of which can be read alone: the `Reader` (rows -> examples), the `Encoder`
(examples -> a source of batches), the `Learner` (a batch -> the terms of a loss) and the `Scorer` (outputs -> metrics and
answers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.backbone.load import positions_of
from graftkit.backbone.prompts import positions_taken
from graftkit.data.columns import Column
from graftkit.data.read import Table, read_table
from graftkit.data.source import LOSS, Batch, Pass, Source
from graftkit.data.split import hold_out
from graftkit.data.stream import slices, stream_table
from graftkit.errors import NoGoodRows, UserError
from graftkit.recipe.catalogue import check_values, entry_name
from graftkit.recipe.expressions import as_expression

MAX_DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Examples:
    """Checked rows of one table, and a message for each bad one that was left out.

    `values`: by name of the task's column, one for each row. `targets`: what is learned, one for each row, in the
    form that the task likes; None where rows are only to be answered.
    """

    table: Table
    values: dict[str, list[Any]]
    targets: Sequence[Any] | np.ndarray | None = None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def where(self, row: int) -> str:
        return self.table.where(row)

    def take(self, rows: Sequence[int]) -> Examples:
        targets = self.targets
        if targets is not None:
            targets = targets[list(rows)] if isinstance(targets, np.ndarray) else [targets[i] for i in rows]
        values = {name: [column[i] for i in rows] for name, column in self.values.items()}
        return replace(self, table=self.table.take(rows), values=values, targets=targets)


class Dataset(Source):
    """A source of checked rows in memory. There can be more or fewer of them than examples: windows of long texts, packed
    texts.

    `lengths` (rows,): size of each row. `units` (rows,): how many things the loss of each row is a sum over, 1 or its
    target tokens.
    """

    lengths: np.ndarray

    def __init__(self, examples: Examples, lengths: np.ndarray, units: np.ndarray | None = None) -> None:
        self.examples = examples
        self.lengths = lengths
        self.units = np.ones(len(lengths)) if units is None else units

    def __len__(self) -> int:
        return len(self.lengths)

    def count(self, rows: np.ndarray, at: Pass) -> Mapping[str, float]:
        return {LOSS: float(self.units[rows].sum())}

    def where(self, row: int) -> str:
        return self.examples.where(row)

    def digest(self) -> str:
        digest = hashlib.sha256()
        for part in self.digested():
            digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def digested(self) -> Sequence[bytes | np.ndarray]:
        """What the digest is of."""
        raise NotImplementedError


@dataclass(frozen=True)
class Reading:
    """How files are read: what `data` in a recipe says of it."""

    encoding: str = "utf-8"
    skip_bad: bool = False
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """One part of a loss on the rows of one batch.

    `losses`: (rows,) in fp32, each summed over the row's units; or their sum (), and then `by_row` gives them on demand,
    so that a bad row can be named. `correct`: how many units were answered right, (rows,) or a sum, where that means
    anything. The units are counted by `Source.count` under the same name. `weight`: of this term in the step's loss.
    """

    losses: Tensor
    correct: Tensor | None = None
    weight: float = 1.0
    by_row: Callable[[], Tensor] | None = None

    def each(self) -> Tensor:
        """The losses of the rows (rows,)."""
        return self.losses if self.by_row is None else self.by_row()


Terms = Mapping[str, Term]


class Calls(Protocol):
    """The engine's forward function, as tasks see it: autocast and the activation cache are inside it."""

    graft: Any
    device: torch.device

    def __call__(self, batch: Batch) -> Tensor:
        """The outputs (`Source.call`) of the model with its graft."""
        ...

    def base(self, batch: Batch) -> Tensor:
        """Those of the model with the graft switched off, in eval mode and without gradients. Needs `Task.needs_base`."""
        ...


Learn = Callable[[Calls, Batch], Terms]


def one_term(loss: Callable[[Tensor, Batch], Term]) -> Learn:
    """The learner of a loss with one term, computed from the outputs of one forward pass."""

    def learn(forward: Calls, batch: Batch) -> Terms:
        return {LOSS: loss(forward(batch), batch)}

    return learn


class Reader:
    """How rows are read and checked."""

    columns: ClassVar[tuple[Column, ...]] = ()
    labelled: ClassVar[tuple[str, ...]] = ("label",)  # columns that hold the answer; `predict` needs none

    def read(self, source: Any, reading: Reading, name: str) -> Table:
        """The table of a file, a folder, or what Python holds, which messages call `name`."""
        return read_table(source, encoding=reading.encoding, skip_bad=reading.skip_bad, name=name)

    def pieces(self, source: Any, reading: Reading, name: str, rows: int) -> Iterator[Table]:
        """What `read` gives in tables of at most `rows` rows; where `read` is the one above, only one is in memory."""
        if type(self).read is Reader.read:
            return stream_table(
                source, encoding=reading.encoding, skip_bad=reading.skip_bad, name=name, rows=rows
            )
        return slices(self.read(source, reading, name), rows)

    def used(self, columns: dict[str, str], named: Mapping[str, str], table: Table) -> dict[str, str]:
        """Those of the columns found that are read, where rows can have several forms; `named`: by the recipe."""
        return columns

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        """The answers there are, from the training table; none where a task has no fixed ones."""
        return ()

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        """Rows checked one by one; a bad row is a `UserError`, or left out where `skip_bad` says so."""
        raise NotImplementedError

    def hold_out(self, examples: Examples, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Row numbers to train on and to evaluate on."""
        targets = examples.targets
        whole = targets.tolist() if isinstance(targets, np.ndarray) else [0] * len(examples)
        return hold_out(whole, share, seed)

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        """Rows made of what a person hands to `predict` without a file; None where this is a table already.

        A list of strings, where the task needs one column to answer. Raises `UserError` for what cannot be answered.
        """
        raise NotImplementedError

    def asked(self, examples: Examples, row: int) -> dict[str, Any]:
        """What was asked, as it stands in a row of answers."""
        return {name: values[row] for name, values in examples.values.items() if name not in self.labelled}

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        """What `graftkit predict RUN` takes on a command line, for the model card; a file by default."""
        return "--data FILE"

    def made_up(self, columns: Mapping[str, str], labels: Sequence[str]) -> list[Any] | None:
        """Something to hand to `given` where no rows are at hand to compare an export on; None: only real rows will do."""
        return None


class Encoder:
    """How examples become what the model is called with."""

    # which classes of transformers have the head of this task, in the order in which they are looked for
    families: ClassVar[tuple[str, ...]] = ("SEQUENCE_CLASSIFICATION",)
    per_token: ClassVar[bool] = False  # the head answers for each token, not for a whole text

    def settle(self, backbone: Backbone) -> None:
        """Set what the task's options say in a model that was just loaded, before anything is attached to it."""

    def outputs(self, labels: Sequence[str]) -> int:
        """How many outputs the head has."""
        return len(labels)

    def output_names(self, labels: Sequence[str]) -> Sequence[str]:
        """A name for each output of the head."""
        return labels

    def max_length(self, wanted: int | None, backbone: Backbone) -> int:
        """Tokens of a row at most. Raises `UserError` where the recipe asks for more than the model takes.

        Virtual tokens that a method puts before the text have a part of the model's positions.
        """
        positions = positions_of(backbone.model)
        limit = backbone.max_length or positions or MAX_DEFAULT_LENGTH
        taken = positions_taken(backbone.model) if positions else 0
        most = max(limit, positions or 0) - taken
        if wanted is None:
            return min(limit, most, MAX_DEFAULT_LENGTH)
        if wanted > most:
            beside = f" beside {taken} virtual ones" if taken else ""
            raise UserError(
                f"data.max_length is {wanted}, but {backbone.source} takes {most} tokens at most{beside}."
            )
        return wanted

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        """`training`: the rows are learned from, so augmentation has its place."""
        raise NotImplementedError

    def rendered(self, dataset: Dataset) -> str:
        """A row as the model reads it, to be shown before anything is done; empty where there is nothing to see."""
        return ""

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        """What the rows are like, before training: `rows`, and by size and label what the task knows."""
        lengths = dataset.lengths
        return {
            "rows": len(dataset.examples),
            "lengths": {"unit": dataset.unit, "sum": int(lengths.sum()), "mean": float(lengths.mean()),
                        "longest": int(lengths.max())},
            "truncated": dataset.truncated,
        }  # fmt: skip


class Learner:
    """What is learned from a batch."""

    needs_base: ClassVar[bool] = False  # the loss asks what the model without its graft gives: `forward.base`

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        """The loss of a run on the rows of `dataset`: a function of (forward, batch) that gives its terms, made once.

        The loss of a step is the sum over terms of weight * (the sum over all batches of the step, on all processes) /
        (their units). `forward` may be called as often as the loss needs.
        """
        raise NotImplementedError


class Scorer:
    """What outputs say: figures and answers."""

    headline: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "macro_f1",
    )  # shown first; the first chooses the weights
    # "max" or "min": what is better of a figure that weights can be chosen by; None: they cannot be. Those of `headline`
    # that are not in here are better where they are larger
    directions: ClassVar[Mapping[str, str | None]] = {"loss": "min"}

    def outcomes(self, forward: Calls, batch: Batch) -> Sequence[Any]:
        """What is kept of each row of a batch, small and on the CPU; by default its logits in fp32."""
        return list(forward(batch).float().cpu().numpy())

    def stream(self, forward: Calls, dataset: Dataset, show: Callable[[str], None]) -> Sequence[Any] | None:
        """The outcome of a dataset of one row, shown while it comes; None where a task has it at once."""
        return None

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        """Figures of rows with targets: those of `headline`, each with `NAME_interval` where it has one, `rows`, ...

        `intervals`: False where nobody looks at them, as at evaluations during training: 1,000 resamples take long.
        """
        raise NotImplementedError

    def figures(self, labels: Sequence[str]) -> dict[str, str]:
        """The figures of `metrics` that weights can be chosen by, the default first, each with "max" or "min"."""
        found = {n: self.directions.get(n, "max") for n in (*self.headline, *self.directions)}
        return {name: direction for name, direction in found.items() if direction is not None}

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The answer to each example, to be written beside what was asked."""
        raise NotImplementedError

    def line(self, answer: dict[str, Any]) -> str:
        """One answer for the terminal."""
        raise NotImplementedError

    def plain(self, labels: Sequence[str]) -> dict[str, Any]:
        """What a reader of an exported model's outputs has to know: its `problem_type` in transformers, where it has one
        there; `how` outputs become answers, where not as there; and which `kind` of answers `classifier.py` makes of them
        (single, multi, ordinal, regression). Without a `kind`, a head that pools cannot be exported."""
        return {}

    def worst(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """The examples that the model got most wrong: `where`, what was asked, `expected`, `answer`, `loss`."""
        return []


class Task(Reader, Encoder, Learner, Scorer):
    """Base of all tasks. Subclasses are frozen dataclasses whose fields are declared with `option`.

    Literals of the class that a recipe needs before torch is loaded: `method`, what is trained by default, and `head`,
    whether a head is put on the model.
    """

    modality: ClassVar[str] = "text"
    method: ClassVar[str] = "lora() + head()"
    head: ClassVar[bool] = True
    trains: ClassVar[bool] = True  # False: the model is asked as it is, and a run has no steps and no method
    using: ClassVar[tuple[str, ...]] = ()  # options that may be given anew where a finished run is used

    def __post_init__(self) -> None:
        check_values(self)  # of the dataclass that a subclass is

    def __str__(self) -> str:
        return as_expression(self)

    @property
    def name(self) -> str:
        return entry_name(type(self).__module__)

    def resolve(self, examples: Examples, labels: Sequence[str], seed: int) -> Task:
        """The task with what only the training rows tell written into its options, which are saved with the graft."""
        return self

    def decided(self, metrics: dict[str, Any] | None) -> Task:
        """The same with what the evaluation rows decide, such as a threshold. `metrics`: theirs with the weights that
        are kept; None where a run had none."""
        return self


def check_rows(
    table: Table, problem: Callable[[int], str | None], skip_bad: bool
) -> tuple[Table, tuple[str, ...]]:
    """The good rows of a table, and a message for each bad one. `problem` says what is wrong with a row, and where.

    Raises `UserError` for the first bad row unless `skip_bad`, and where no row is good.
    """
    good, skipped = [], list(table.skipped)
    for row in range(len(table)):
        found = problem(row)
        if found is None:
            good.append(row)
        elif skip_bad:
            skipped.append(found)
        else:
            raise UserError(f"{found} Mend it, or leave such rows out with data.skip_bad=true.")
    if not good:
        raise NoGoodRows(f"{table.source} has no good rows: {skipped[0]}", skipped)
    return table.take(good), tuple(skipped)
