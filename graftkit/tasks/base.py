"""What a task is: which columns, how rows become tensors, which loss and metrics, how outputs become answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.load import positions_of
from graftkit.backbone.prompts import positions_taken
from graftkit.data.columns import Column
from graftkit.data.read import Table, read_table
from graftkit.data.split import hold_out
from graftkit.data.stream import slices, stream_table
from graftkit.errors import NoGoodRows, UserError
from graftkit.recipe.catalogue import as_expression, check_values, entry_name

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


class Batch:
    """Some rows of a dataset on a device. `inputs` and `targets` are made when first asked for, and once.

    Kept outputs of a frozen prefix often make `inputs` unnecessary.
    """

    def __init__(self, dataset: Dataset, rows: np.ndarray, device: torch.device | None = None) -> None:
        self.dataset = dataset
        self.rows = rows
        self.device = device

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {name: self.move(tensor) for name, tensor in self.dataset.inputs(self.rows).items()}

    @cached_property
    def targets(self) -> Tensor | None:
        targets = self.dataset.targets(self.rows)
        return None if targets is None else self.move(targets)

    def move(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device, non_blocking=True)


class Dataset:
    """Rows as a model takes them. There can be more or fewer than examples: windows of long texts, packed texts.

    `lengths`: size of each row, in tokens where it has any; rows of like size share a batch. `units`: how many things
    the loss of each row is a sum over, 1 or its labelled tokens; a step's loss is the mean over the units of all its
    batches. `truncated`: how many rows lost something because they are longer than the model takes.
    """

    unit: ClassVar[str] = "tokens"  # of `lengths`
    uniform: bool = False  # inputs of all rows have one shape, so that nothing is padded
    keeps: bool = (
        True  # a row is the same in each epoch and is one row for the model: its outputs may be kept
    )
    truncated: int = 0

    def __init__(self, examples: Examples, lengths: np.ndarray, units: np.ndarray | None = None) -> None:
        self.examples = examples
        self.lengths = lengths
        self.units = np.ones(len(lengths)) if units is None else units

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: np.ndarray, device: torch.device | None = None) -> Batch:
        return Batch(self, rows, device)

    def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        """What the model is called with for these rows."""
        raise NotImplementedError

    def targets(self, rows: np.ndarray) -> Tensor | None:
        """What the loss of these rows is computed from; None where they have none."""
        return None

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the task's loss and outcomes are computed from, by calling the model on a batch."""
        output = model(**batch.inputs)
        return output if isinstance(output, Tensor) else output.logits

    def where(self, row: int) -> str:
        """The place of a row in what the user handed over."""
        return self.examples.where(row)

    def digest(self) -> str:
        """Of all that a run learns from; another one tells that the rows are not those that a run began with."""
        digest = hashlib.sha256()
        for part in self.digested():
            digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def digested(self) -> Sequence[bytes | np.ndarray]:
        raise NotImplementedError


@dataclass(frozen=True)
class Scores:
    """Of the rows of one batch: `losses` (rows,), in fp32, each summed over the row's units; `hits`: how many units
    were answered right, (rows,) or a sum, where that can be said."""

    losses: Tensor
    hits: Tensor | None = None


Criterion = Callable[[Tensor, Batch], Scores]


class Calls(Protocol):
    """The engine's forward function, as tasks see it."""

    graft: Any
    device: torch.device

    def __call__(self, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Reading:
    """How files are read: what `data` in a recipe says of it."""

    encoding: str = "utf-8"
    skip_bad: bool = False
    columns: dict[str, str] = field(default_factory=dict)


class Task:
    """Base of all tasks. Subclasses are frozen dataclasses whose fields are declared with `option`.

    Literals of the class that a recipe needs before torch is loaded: `method`, what is trained by default, and `head`,
    whether a head is put on the model.
    """

    columns: ClassVar[tuple[Column, ...]] = ()
    labelled: ClassVar[tuple[str, ...]] = ("label",)  # columns that hold the answer; `predict` needs none
    method: ClassVar[str] = "lora() + head()"
    head: ClassVar[bool] = True
    trains: ClassVar[bool] = True  # False: the model is asked as it is, and a run has no steps and no method
    per_token: ClassVar[bool] = False  # the head answers for each token, not for a whole text
    # the figures that are shown first; the first chooses the best weights, larger is better but for 'loss'
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")
    using: ClassVar[tuple[str, ...]] = ()  # options that may be given anew where a finished run is used
    # which classes of transformers have the head of this task, in the order in which they are looked for
    families: ClassVar[tuple[str, ...]] = ("SEQUENCE_CLASSIFICATION",)

    def __post_init__(self) -> None:
        check_values(self, "task")  # of the dataclass that a subclass is

    def __str__(self) -> str:
        return as_expression(self)

    @property
    def name(self) -> str:
        return entry_name(type(self).__module__)

    # what is handed over

    def read(self, source: Any, reading: Reading, name: str) -> Table:
        """The table of a file, a folder, or what Python holds, which messages call `name`."""
        return read_table(source, encoding=reading.encoding, skip_bad=reading.skip_bad, name=name)

    def pieces(self, source: Any, reading: Reading, name: str, rows: int) -> Iterator[Table]:
        """What `read` gives in tables of at most `rows` rows; where `read` is the one above, only one is in memory."""
        if type(self).read is Task.read:
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

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        """What `graftkit predict RUN` takes on a command line, for the model card; a file by default."""
        return "--data FILE"

    def made_up(self, columns: Mapping[str, str], labels: Sequence[str]) -> list[Any] | None:
        """Something to hand to `given` where no rows are at hand to compare an export on; None: only real rows will do."""
        return None

    def resolve(self, examples: Examples, labels: Sequence[str], seed: int) -> Task:
        """The task with what only the training rows tell written into its options, which are saved with the graft."""
        return self

    def decided(self, metrics: dict[str, Any] | None) -> Task:
        """The same with what the evaluation rows decide, such as a threshold. `metrics`: theirs with the weights that
        are kept; None where a run had none."""
        return self

    # what the model sees

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

    # what is learned

    def criterion(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Criterion:
        """The loss, made once for a run on the rows of `dataset`."""
        raise NotImplementedError

    # what comes out

    def outcomes(self, forward: Calls, batch: Batch) -> Sequence[Any]:
        """What is kept of each row of a batch, small and on the CPU; by default its logits in fp32."""
        return list(forward(batch).float().cpu().numpy())

    def stream(self, forward: Calls, dataset: Dataset, show: Callable[[str], None]) -> Sequence[Any] | None:
        """The outcome of a dataset of one row, shown while it comes; None where a task has it at once."""
        return None

    def metrics(self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        """Figures of rows with targets: those of `headline`, each with `NAME_interval` where it has one, `rows`, ..."""
        raise NotImplementedError

    def better(self, metrics: dict[str, Any], best: dict[str, Any]) -> bool:
        """Whether weights with these metrics are to be kept instead of the best so far."""
        name = self.headline[0]
        sign = -1 if name in ("loss", "perplexity") else 1
        return (sign * metrics[name], -metrics["loss"]) > (sign * best[name], -best["loss"])

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The answer to each example, to be written beside what was asked."""
        raise NotImplementedError

    def asked(self, examples: Examples, row: int) -> dict[str, Any]:
        """What was asked, as it stands in a row of answers."""
        return {name: values[row] for name, values in examples.values.items() if name not in self.labelled}

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

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        """What the rows are like, before training: `rows`, and by size and label what the task knows."""
        lengths = dataset.lengths
        return {
            "rows": len(dataset.examples),
            "lengths": {"unit": dataset.unit, "sum": int(lengths.sum()), "mean": float(lengths.mean()),
                        "longest": int(lengths.max())},
            "truncated": dataset.truncated,
        }  # fmt: skip


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
