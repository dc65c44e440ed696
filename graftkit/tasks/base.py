"""The task contract: columns, encoding of rows as tensors, loss, metrics, and how outputs become answers.

A task combines four parts that can be read independently: the `Reader` (rows -> examples), the `Encoder` (examples -> a
source of batches), the `Learner` (a batch -> the terms of a loss) and the `Scorer` (outputs -> metrics and answers);
`Explained` says how its answers are explained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

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
from graftkit.tasks.examples import Examples
from graftkit.tasks.explained import Explained
from graftkit.tasks.shared.by_row import ByRow
from graftkit.tasks.terms import Calls, Learn, Term, Terms, one_term  # noqa: F401

MAX_DEFAULT_LENGTH = 512
SAMPLE = 4  # examples that are encoded before weights are read


class Dataset(Source):
    """A source of validated rows in memory. The number of rows may differ from the number of examples: long texts are
    split into windows, short ones are packed.

    `lengths` (rows,): size of each row. `units` (rows,): number of terms summed in each row's loss, 1 or its number of
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

    def example(self, row: int) -> int:
        """Return the example that a row is of."""
        return row

    def about(self, row: int, number: int) -> dict[str, Any]:
        """Return what an answer is about within its example. `number`: of the known answers to this row."""
        return {}

    def digest(self) -> str:
        digest = hashlib.sha256()
        for part in self.digested():
            digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def digested(self) -> Sequence[bytes | np.ndarray]:
        """Return the parts of the dataset that the digest covers."""
        raise NotImplementedError


@dataclass(frozen=True)
class Reading:
    """How files are read: the reading options of `data` in a recipe."""

    encoding: str = "utf-8"
    skip_bad: bool = False
    columns: dict[str, str] = field(default_factory=dict)


class Reader:
    """How rows are read and validated."""

    columns: ClassVar[tuple[Column, ...]] = ()
    labelled: ClassVar[tuple[str, ...]] = ("label",)  # columns with the answer, which `predict` does not need

    def read(self, source: Any, reading: Reading, name: str) -> Table:
        """Read a file, a folder or a Python object as a table. Messages refer to it as `name`."""
        return read_table(source, encoding=reading.encoding, skip_bad=reading.skip_bad, name=name)

    def pieces(self, source: Any, reading: Reading, name: str, rows: int) -> Iterator[Table]:
        """Yield what `read` returns as tables of at most `rows` rows; unless `read` is overridden, one at a time is in
        memory."""
        if type(self).read is Reader.read:
            return stream_table(
                source, encoding=reading.encoding, skip_bad=reading.skip_bad, name=name, rows=rows
            )
        return slices(self.read(source, reading, name), rows)

    def used(self, columns: dict[str, str], named: Mapping[str, str], table: Table) -> dict[str, str]:
        """Return the subset of `columns` to read, for tasks whose rows come in several forms; `named`: those that the
        recipe names."""
        return columns

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        """Return the labels found in the training table; empty for a task without a fixed set of labels."""
        return ()

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        """Validate the rows one by one. A bad row raises `UserError`, or is skipped with `skip_bad`."""
        raise NotImplementedError

    def hold_out(self, examples: Examples, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Split the rows into row numbers to train on and to evaluate on."""
        targets = examples.targets
        whole = targets.tolist() if isinstance(targets, np.ndarray) else [0] * len(examples)
        return hold_out(whole, share, seed)

    def split(self, examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
        """Return the examples to train on and those to evaluate on."""
        kept, out = self.hold_out(examples, share, seed)
        return examples.take(kept), examples.take(out)

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        """Return rows made from items passed to `predict` without a file; None if the items already form a table.

        The items are strings if the task predicts from one column. Raises `UserError` for items without an answer.
        """
        raise NotImplementedError

    def asked(self, examples: Examples, row: int) -> dict[str, Any]:
        """Return the inputs of an example, as written in a row of answers."""
        return {name: values[row] for name, values in examples.values.items() if name not in self.labelled}

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        """Return the arguments of `graftkit predict RUN` to show in the model card; a file by default."""
        return "--data FILE"

    def made_up(self, columns: Mapping[str, str], labels: Sequence[str]) -> list[Any] | None:
        """Return items for `given`, to verify an export if no rows are available; None if only real rows will do."""
        return None


class Encoder:
    """How examples become model inputs."""

    # transformers' model classes that have the head of this task, in the order in which they are tried
    families: ClassVar[tuple[str, ...]] = ("SEQUENCE_CLASSIFICATION",)
    per_token: ClassVar[bool] = False  # the head has outputs for each token, not for a whole text

    def settle(self, backbone: Backbone) -> None:
        """Apply the task's options to a freshly loaded model, before anything is attached to it."""

    def outputs(self, labels: Sequence[str]) -> int:
        """Return the number of outputs of the head."""
        return len(labels)

    def output_names(self, labels: Sequence[str]) -> Sequence[str]:
        """Return a name for each output of the head."""
        return labels

    def max_length(self, wanted: int | None, backbone: Backbone) -> int:
        """Return the maximum number of tokens of a row. Raises `UserError` if the recipe asks for too many.

        Virtual tokens that a method prepends to the text use up some of the model's positions.
        """
        positions = positions_of(backbone.model)
        limit = backbone.max_length or positions or MAX_DEFAULT_LENGTH
        taken = positions_taken(backbone.model) if positions else 0
        most = max(limit, positions or 0) - taken
        if wanted is None:
            return min(limit, most, MAX_DEFAULT_LENGTH)
        if wanted > most:
            beside = f" in addition to {taken} virtual tokens" if taken else ""
            raise UserError(
                f"data.max_length is {wanted}, but {backbone.source} takes at most {most} tokens{beside}."
            )
        return wanted

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        """Encode the examples. `training`: the rows are trained on, so augmentation applies."""
        raise NotImplementedError

    def rehearse(self, examples: Examples, backbone: Backbone, max_length: int) -> None:
        """Encode a few examples on the meta device, before weights are read, to raise what would be raised later."""
        few = examples.take(range(min(SAMPLE, len(examples))))
        self.dataset(few, backbone, max_length, training=True)

    def rendered(self, dataset: Dataset) -> str:
        """Return a row as the model reads it, to show before training; empty if there is nothing to show."""
        return ""

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        """Return statistics of the rows before training: `rows`, their sizes, and what else the task reports."""
        lengths = dataset.lengths
        return {
            "rows": len(dataset.examples),
            "lengths": {"unit": dataset.unit, "sum": int(lengths.sum()), "mean": float(lengths.mean()),
                        "longest": int(lengths.max())},
            "truncated": dataset.truncated,
        }  # fmt: skip


class Learner:
    """The loss of a batch."""

    # the loss needs outputs of the model without its graft: `forward.base`
    needs_base: ClassVar[bool] = False

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        """Return the loss function of a run on the rows of `dataset`, called once per run. It takes (forward, batch) and
        returns the terms of the loss.

        The loss of a step is the sum over terms of weight * (the sum over all batches of the step, on all processes) /
        (their units). The loss may call `forward` as often as it needs.
        """
        raise NotImplementedError


class Scorer(ByRow):
    """Metrics and answers computed from outputs."""

    headline: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "macro_f1",
    )  # shown first; the first selects the best checkpoint
    # "max" or "min": which direction is better, for metrics that can select a checkpoint; None for those that cannot.
    # Metrics of `headline` that are not listed are better if larger
    directions: ClassVar[Mapping[str, str | None]] = {"loss": "min"}
    # what logits are of, if their probabilities can be calibrated: 'label', 'labels' (any number of them) or 'words'
    calibrates: ClassVar[str | None] = None

    def outcomes(self, forward: Calls, batch: Batch) -> Sequence[Any]:
        """Return what to keep of each row of a batch for `metrics`, small and on the CPU; its fp32 logits by default."""
        return list(forward(batch).float().cpu().numpy())

    def stream(self, forward: Calls, dataset: Dataset, show: Callable[[str], None]) -> Sequence[Any] | None:
        """Return the outcome of a dataset of one row, shown while it is generated; None if nothing is generated."""
        return None

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        """Compute metrics on rows with targets: those of `headline`, each with `NAME_interval` if it has one, `rows`, ...

        `intervals`: False skips the intervals, as in evaluations during training, because 1,000 resamples are slow.
        """
        raise NotImplementedError

    def figures(self, labels: Sequence[str]) -> dict[str, str]:
        """Return the metrics that can select a checkpoint, the default first, each with "max" or "min"."""
        found = {n: self.directions.get(n, "max") for n in (*self.headline, *self.directions)}
        return {name: direction for name, direction in found.items() if direction is not None}

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the answer to each example, to be written next to its inputs."""
        raise NotImplementedError

    def line(self, answer: dict[str, Any]) -> str:
        """Format one answer for the terminal."""
        raise NotImplementedError

    def plain(self, labels: Sequence[str]) -> dict[str, Any]:
        """Describe how to interpret the outputs of an exported model: its `problem_type` in transformers, if it has one;
        `how` outputs become answers, if it differs from transformers; and the `kind` of answers that `classifier.py` makes
        of them (single, multi, ordinal, regression). Without a `kind`, a pooling head cannot be exported."""
        return {}

    def preview(self, examples: Examples, row: int) -> dict[str, str]:
        """Return what a report shows or plays of an example, as data URIs: `image`, or `sound` and `spectrogram`."""
        return {}

    def worst(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """Return the examples that the model got most wrong: `where`, the inputs, `expected`, `answer`, `loss`."""
        return []


class Task(Reader, Encoder, Learner, Scorer, Explained):
    """Base of all tasks. Subclasses are frozen dataclasses whose fields are declared with `option`.

    Two class attributes must be literals, because a recipe reads them before torch is loaded: `method`, the default
    method, and `head`, whether the task adds a head to the model.
    """

    aliases: ClassVar[tuple[str, ...]] = ()  # other names that recipes may use
    meant: ClassVar[
        Mapping[str, str]
    ] = {}  # names that people try, with the expression that they should write
    modality: ClassVar[str] = "text"
    method: ClassVar[str] = "lora() + head()"
    head: ClassVar[bool] = True
    # a row has one vector of features and one answer: a label, a set of labels or a number
    one_answer: ClassVar[bool] = False
    # if the model's weights lack its own head, it may be a new one, which is trained
    new_head: ClassVar[bool] = False
    makes_model: ClassVar[bool] = False  # a run ends with a plain model in RUN/model, beside its graft
    trains: ClassVar[bool] = True  # False: the model is used unchanged, and a run has no steps and no method
    using: ClassVar[tuple[str, ...]] = ()  # options that may be overridden when a finished run is used

    def __post_init__(self) -> None:
        check_values(self)  # the fields of the subclass

    def __str__(self) -> str:
        return as_expression(self)

    @property
    def name(self) -> str:
        return entry_name(type(self).__module__)

    def resolve(self, examples: Examples, labels: Sequence[str], seed: int) -> Task:
        """Return the task with the options that depend on the training rows filled in. They are saved with the graft."""
        return self

    def decided(self, metrics: dict[str, Any] | None) -> Task:
        """Return the task with the options that depend on the evaluation rows filled in, such as a threshold. `metrics`:
        evaluation metrics of the weights that are kept; None if the run had no evaluation."""
        return self

    def scaled(self, temperature: float) -> Task:
        """Return the task that gives the same answers for logits divided by `temperature`."""
        return self


def check_rows(
    table: Table, problem: Callable[[int], str | None], skip_bad: bool
) -> tuple[Table, tuple[str, ...]]:
    """Return the good rows of a table, and a message for each bad one. `problem` says what is wrong with a row, and where.

    Raises `UserError` for the first bad row unless `skip_bad`, and if no row is good.
    """
    good, skipped = [], list(table.skipped)
    for row in range(len(table)):
        found = problem(row)
        if found is None:
            good.append(row)
        elif skip_bad:
            skipped.append(found)
        else:
            raise UserError(f"{found} Fix the row, or skip bad rows with data.skip_bad=true.")
    if not good:
        raise NoGoodRows(f"{table.source} has no good rows: {skipped[0]}", skipped)
    return table.take(good), tuple(skipped)
