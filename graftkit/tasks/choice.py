"""Multiple choice: one of several answers given with each question."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.data.columns import Column
from graftkit.data.encode import Encoded, encode_texts
from graftkit.data.json_text import parse_json
from graftkit.data.ragged import places
from graftkit.data.read import Table
from graftkit.data.source import Batch, Pass
from graftkit.data.split import hold_out
from graftkit.data.stream import stream_table
from graftkit.errors import UserError, listing
from graftkit.tasks.base import Dataset, Examples, Learn, Reading, Task, Term, check_rows, one_term
from graftkit.tasks.shared.by_row import means
from graftkit.tasks.shared.items import check_texts
from graftkit.tasks.shared.labels import LABEL, is_missing
from graftkit.tasks.shared.masked import masked_cross_entropy
from graftkit.tasks.shared.metrics import calibration, log_softmax, mean_interval
from graftkit.tasks.shared.texts import TextDataset, check_encoded, text_problem, tokenizer_of

# columns that hold one choice each: choice0, choice_1, ending2, option a, A, ...
NUMBERED = re.compile(r"(?:(choice|ending|option|answer|sol|opa?)[ _-]?)(\d+|[a-z])", re.IGNORECASE)
LETTER = re.compile("[A-Za-z]")


class Choices(TextDataset):
    """Questions as rows: the model reads each question once per choice."""

    keeps = False  # one row here is several for the model

    def __init__(self, examples: Examples, encoded: Encoded, counts: np.ndarray) -> None:
        targets = examples.targets
        super().__init__(examples, encoded, None if targets is None else np.asarray(targets))
        self.begins = np.concatenate([[0], np.cumsum(counts)])
        self.lengths = np.add.reduceat(encoded.lengths, self.begins[:-1])
        self.units = np.ones(len(counts))

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        return self.encoded.pad(places(self.begins[rows], self.begins[rows + 1] - self.begins[rows]))

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the score of each choice, (rows, largest number of choices), -inf for choices that a row does not have."""
        output = model(**batch.inputs)
        scores = (output if isinstance(output, Tensor) else output.logits).squeeze(-1)
        counts = np.diff(self.begins)[batch.rows]
        here = torch.arange(int(counts.max())) < torch.from_numpy(counts).unsqueeze(1)
        full = scores.new_full(here.shape, -torch.inf)
        return full.masked_scatter(here.to(scores.device), scores)


@dataclass(frozen=True)
class Choice(Task):
    """Multiple choice: one of several answers that are given in the row."""

    aliases: ClassVar[tuple[str, ...]] = ("multiple_choice",)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("question", ("prompt", "query", "stem", "ctx", "startphrase", "sent1", "text"), "question", required=False),
        Column("context", ("passage", "article", "support"), "context", required=False),
        Column("choices", ("options", "endings", "answers", "candidates"), "choices", required=False),
        Column("label", ("answer", "answerKey", "answer_key", "correct", "gold", *LABEL), "answer", required=False),
    )  # fmt: skip
    method: ClassVar[str] = "lora() + head()"
    headline: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "chance")
    directions: ClassVar[Mapping[str, str | None]] = {"loss": "min", "chance": None}

    def read(self, source: Any, reading: Reading, name: str) -> Table:
        return gathered(super().read(source, reading, name))

    def pieces(self, source: Any, reading: Reading, name: str, rows: int) -> Iterator[Table]:
        pieces = stream_table(
            source, encoding=reading.encoding, skip_bad=reading.skip_bad, name=name, rows=rows
        )
        return map(gathered, pieces)

    def outputs(self, labels: Sequence[str]) -> int:
        return 1

    def output_names(self, labels: Sequence[str]) -> Sequence[str]:
        return ("score",)

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        for name in ("choices", *(["label"] if targets else [])):
            if name not in columns:
                beside = ", or columns choice0, choice1, ..., or A, B, ..." if name == "choices" else ""
                raise UserError(
                    f"{table.source} has no column {name!r} (columns: {listing(table.columns)}). Name it with "
                    f"data.columns={{{name}: ...}}{beside}."
                )
        texts = [name for name in ("question", "context") if name in columns]

        def problem(row: int) -> str | None:
            found = next(filter(None, (text_problem(table, columns[name], row) for name in texts)), None)
            if found is not None:
                return found
            name = columns["choices"]
            try:
                choices, keys = read_choices(table.columns[name][row])
                name = columns.get("label", "")
                if targets:
                    find_label(table.columns[name][row], choices, keys)
            except ValueError as error:
                return f"{table.where(row)}: column {name!r}: {error}."
            return None

        kept, skipped = check_rows(table, problem, skip_bad)
        read = [read_choices(value) for value in kept.columns[columns["choices"]]]
        values: dict[str, list[Any]] = {
            name: [str(value) for value in kept.columns[columns[name]]] for name in texts
        }
        values["choices"] = [choices for choices, _ in read]
        numbers = None
        if targets:
            found = zip(kept.columns[columns["label"]], read)
            numbers = np.array([find_label(value, *choices) for value, choices in found], dtype=np.int64)
        return Examples(kept, values, numbers, skipped)

    def hold_out(self, examples: Examples, share: float, seed: int) -> tuple[list[int], list[int]]:
        return hold_out([0] * len(examples), share, seed)  # the place of the right choice is no class

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        """Rows of a list of (question, [choice, ...]), or one row of QUESTION CHOICE CHOICE ...; without a question
        where the run was trained on none."""
        asks = [name for name in ("question", "context") if name in columns]
        if len(asks) > 1:
            asks = []
            if items and not all(isinstance(item, Mapping) for item in items):
                raise UserError(
                    "this run was trained on questions with a context; give --data FILE, or dicts in Python."
                )
        if items and all(isinstance(item, str) for item in items):
            least = len(asks) + 2
            if len(items) < least:
                wanted = " ".join([*(name.upper() for name in asks), "CHOICE CHOICE ..."])
                raise UserError(
                    f"{len(items)} text{'s are' if len(items) > 1 else ' is'} given, but a choice needs at least {least}: {wanted}, or --data FILE."
                )
            items = [(items[0], items[1:])] if asks else [items]
        if not items:
            raise UserError(
                "there is nothing to choose from; give QUESTION CHOICE CHOICE ..., or --data FILE."
            )
        for number, item in enumerate(items, start=1):
            if isinstance(item, tuple | list):
                where = f"item {number} of {len(items)}"
                choices = item[-1] if asks and len(item) == 2 else item
                if asks and (len(item) != 2 or not isinstance(choices, tuple | list)):
                    raise UserError(f"{where} must be a {asks[0]} and a list of choices.")
                check_texts(item[: len(asks)], where, asks)
                check_texts(choices, where, [f"choice {place}" for place, _ in enumerate(choices, start=1)])
        if asks and all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
            return [{columns[asks[0]]: text, columns["choices"]: choices} for text, choices in items]
        if not asks and all(isinstance(item, tuple | list) for item in items):
            return [{columns["choices"]: list(item)} for item in items]
        return None

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        if {"question", "context"} <= columns.keys():
            return "--data FILE"
        asked = [name for name in ("question", "context") if name in columns]
        return " ".join(f'"a {name}"' for name in [*asked, "choice", "choice"])

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        """Encode question and choice as a pair of texts; with a context, the context and the question with the choice."""
        values = examples.values
        counts = np.array([len(choices) for choices in values["choices"]])
        rows = np.repeat(np.arange(len(counts)), counts)
        second = [choice for row in values["choices"] for choice in row]
        first = values.get("question")
        if "context" in values:
            if first is not None:
                second = [f"{first[row]} {choice}" for row, choice in zip(rows, second)]
            first = values["context"]
        texts = second if first is None else [first[row] for row in rows]
        pairs = None if first is None else second
        encoded = encode_texts(tokenizer_of(backbone, self), texts, pairs, max_length)
        check_encoded(backbone, encoded, lambda i: examples.where(int(rows[i])))
        return Choices(examples, encoded, counts)

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        """Return the cross-entropy over the choices of each row."""

        def scores(logits: Tensor, batch: Batch) -> Term:
            assert batch.targets is not None
            logits = logits.float()
            losses = masked_cross_entropy(logits, batch.targets, logits > -torch.inf, label_smoothing)
            return Term(losses, logits.detach().argmax(dim=-1) == batch.targets)

        return one_term(scores)

    def outcomes(self, forward: Any, batch: Batch) -> Sequence[np.ndarray]:
        """Return the log-probabilities of each row's choices."""
        logits = forward(batch).float().cpu().numpy()
        return [log_softmax(row[row > -np.inf]) for row in logits]

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        """Compute accuracy and loss. `chance`: expected accuracy of random guessing."""
        targets = np.asarray(dataset.examples.targets)
        right = np.array([logs.argmax() == target for logs, target in zip(outcomes, targets)], dtype=float)
        losses = [-logs[target] for logs, target in zip(outcomes, targets)]
        return {
            "accuracy": float(right.mean()), **mean_interval("accuracy", right, intervals),
            "loss": float(np.mean(losses)), "chance": float(np.mean([1 / len(logs) for logs in outcomes])),
            "rows": len(right),
            **({"calibration": calibration(np.exp([logs.max() for logs in outcomes]), right)} if intervals else {}),
        }  # fmt: skip

    def by_row(self, outcomes: Sequence[Any], dataset: Any, labels: Sequence[str]) -> dict[str, np.ndarray]:
        pairs = list(zip(outcomes, np.asarray(dataset.examples.targets)))
        right = [logs.argmax() == target for logs, target in pairs]
        return means(accuracy=right, loss=[-logs[target] for logs, target in pairs])

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the most likely choice of each row, its index (from 0) and probability, and all probabilities."""
        return [
            {
                "answer": choices[int(logs.argmax())],
                "label": int(logs.argmax()),
                "probability": round(float(np.exp(logs.max())), 4),
                "probabilities": [round(float(p), 4) for p in np.exp(logs)],
            }
            for logs, choices in zip(outcomes, dataset.examples.values["choices"])
        ]

    def line(self, answer: dict[str, Any]) -> str:
        asked = [answer[name] for name in ("context", "question") if name in answer]
        return "\t".join([answer["answer"], f"{answer['probability']:.3f}", *asked])

    def worst(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """Return wrong answers, largest loss first."""
        examples, targets = dataset.examples, np.asarray(dataset.examples.targets)
        losses = np.array([-logs[target] for logs, target in zip(outcomes, targets)])
        wrong = [int(i) for i in np.argsort(-losses) if outcomes[i].argmax() != targets[i]]
        return [
            {
                "where": examples.where(i),
                **self.asked(examples, i),
                "expected": examples.values["choices"][i][targets[i]],
                "answer": examples.values["choices"][i][int(outcomes[i].argmax())],
                "loss": round(float(losses[i]), 4),
            }
            for i in wrong[:count]
        ]

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        """Add `choices`, the number of rows for each number of choices, and `places`, for each index of the right choice."""
        found = super().statistics(dataset, labels)
        examples = dataset.examples
        counts = np.unique([len(row) for row in examples.values["choices"]], return_counts=True)
        found["choices"] = {str(size): int(rows) for size, rows in zip(*counts)}
        if examples.targets is not None:
            places = np.unique(np.asarray(examples.targets), return_counts=True)
            found["places"] = {str(place): int(rows) for place, rows in zip(*places)}
        return found


def gathered(table: Table) -> Table:
    """Merge the columns of single choices, if there are any, into one column `choices`."""
    if any(name.casefold() in ("choices", "options", "endings") for name in table.columns):
        return table
    families: dict[str, dict[str, str]] = {}
    for name in table.columns:
        found = NUMBERED.fullmatch(name)
        if found or LETTER.fullmatch(name):
            family, place = (found[1].lower(), found[2]) if found else ("", name)
            families.setdefault(family, {})[place.lower()] = name
    order = next((order for order in map(_in_order, families.values()) if order), None)
    if order is None:
        return table
    columns = {name: values for name, values in table.columns.items() if name not in order}
    rows = zip(*(table.columns[name] for name in order))
    columns["choices"] = [_without_end(list(row)) for row in rows]
    return replace(table, columns=columns)


def _in_order(family: dict[str, str]) -> list[str]:
    """Return column names in the order of their number or letter, if there are two or more without a gap."""
    numbers = sorted((int(p) if p.isdecimal() else string.ascii_lowercase.index(p) + 1000, p) for p in family)
    first = [0, 1] if numbers[0][0] < 1000 else [1000]
    whole = [number for number, _ in numbers] == list(range(numbers[0][0], numbers[0][0] + len(numbers)))
    return (
        [family[place] for _, place in numbers]
        if whole and len(numbers) > 1 and numbers[0][0] in first
        else []
    )


def _without_end(row: list[Any]) -> list[Any]:
    """Drop empty cells after the last choice: rows with fewer choices leave columns empty."""
    while row and is_missing(row[-1]):
        row.pop()
    return row


def read_choices(value: Any) -> tuple[list[str], list[str]]:
    """Return the choices of a row and the letters or numbers that name them, if any.

    `value`: a list of texts, {text: [...], label: [...]} as in ARC, or either as JSON text. Raises `ValueError`.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError(f"the list of choices is not JSON: {error}") from None
    keys: list[str] = []
    if isinstance(value, Mapping):
        if "text" not in value:
            raise ValueError(f"choices are an object without 'text' (it has: {listing(value)})")
        keys = [str(key).strip() for key in value.get("label", ())]
        value = value["text"]
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"a {type(value).__name__} where a list of choices should be")
    if len(value) < 2:
        raise ValueError(
            f"{len(value)} choice{'' if len(value) == 1 else 's'}, where at least two are needed"
        )
    for number, choice in enumerate(value):
        if is_missing(choice):
            raise ValueError(f"choice {number} (from 0) of {len(value)} is empty")
        if not isinstance(choice, str | int | float):
            raise ValueError(f"choice {number} (from 0) is a {type(choice).__name__}, not a text")
    if keys and (len(keys) != len(value) or len(set(keys)) < len(keys)):
        raise ValueError(
            f"the names of the choices ({listing(keys, 8)}) are not one for each of {len(value)}"
        )
    return [str(choice) for choice in value], keys


def find_label(value: Any, choices: Sequence[str], keys: Sequence[str]) -> int:
    """Return the index of the choice that a label refers to by its name, its index from 0, a letter, or its text.

    Raises `ValueError` if it is none of these, or refers to two different choices.
    """
    if is_missing(value):
        raise ValueError("the label is empty")
    value = value.item() if hasattr(value, "item") else value
    text = str(value).strip()
    if text in keys:
        return keys.index(text)
    number = int(float(text)) if re.fullmatch(r"-?\d+(\.0+)?", text) else None
    if number is not None and not isinstance(value, str):
        return _in_range(number, choices)
    meant = {place for place, choice in enumerate(choices) if choice.strip() == text}
    if len(meant) > 1:
        raise ValueError(f"the label {text!r} is the text of {len(meant)} choices")
    if number is not None and (not meant or 0 <= number < len(choices)):
        meant.add(_in_range(number, choices))
    if LETTER.fullmatch(text) and (place := string.ascii_uppercase.index(text.upper())) < len(choices):
        meant.add(place)
    if len(meant) > 1:
        raise ValueError(
            f"the label {text!r} is the text of one choice and the place of another; write the letters A, B, ... "
            "or, in JSON, numbers from 0"
        )
    if not meant:
        last = string.ascii_uppercase[min(len(choices), 26) - 1]
        raise ValueError(
            f"the label {text!r} is no choice: neither a place (0 to {len(choices) - 1}) or letter (A to {last}), nor "
            f"the text of one ({listing(map(repr, choices), 4)})"
        )
    return meant.pop()


def _in_range(number: int, choices: Sequence[str]) -> int:
    if not 0 <= number < len(choices):
        hint = "; places count from 0" if number == len(choices) else ""
        raise ValueError(
            f"the label {number} is out of range for {len(choices)} choices (0 to {len(choices) - 1}){hint}"
        )
    return number
