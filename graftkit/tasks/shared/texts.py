"""Shared code of tasks on texts: each row is a text or a pair of texts, encoded by the model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.backbone.fit import check_token_ids, check_token_types
from graftkit.data.doubled import Around
from graftkit.data.encode import Encoded, encode_texts
from graftkit.data.read import Table
from graftkit.data.source import Pass, identity_of
from graftkit.data.words import assign, split_words
from graftkit.errors import UserError
from graftkit.tasks.base import Dataset, Examples, Task, check_rows
from graftkit.tasks.explained import Cut
from graftkit.tasks.shared.items import check_kinds, check_texts, is_unicode
from graftkit.tasks.shared.labels import is_missing

TEXT = ("sentence", "content", "review", "question", "query", "utterance", "tweet", "comment", "document")
FIRST = ("text", "text1", "sentence1", "sentence_1", "premise", "question1")
UNKNOWN = 0.05  # warn if this share of the tokens is unknown
SECOND = ("text2", "sentence2", "sentence_2", "hypothesis", "question2", "pair")


class TextDataset(Dataset):
    """Token ids of each row, padded when a batch is made. `numbers`: targets (rows, ...); None for prediction."""

    def __init__(
        self, examples: Examples, encoded: Encoded, numbers: np.ndarray | None = None, units: np.ndarray | None = None
    ) -> None:  # fmt: skip
        super().__init__(examples, encoded.lengths, units)
        self.encoded = encoded
        self.numbers = numbers
        self.truncated = encoded.truncated

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        return self.encoded.pad(rows)

    def targets(self, rows: np.ndarray) -> Tensor | None:
        return None if self.numbers is None else torch.from_numpy(self.numbers[rows])

    def identity(self, row: int, at: Pass) -> bytes | None:
        return identity_of({name: values[row] for name, values in self.encoded.features.items()})

    def warnings(self) -> list[str]:
        encoded = self.encoded
        share = encoded.unknown / max(1, int(encoded.lengths.sum()) - encoded.special * len(encoded))
        if share < UNKNOWN:
            return []
        return [
            f"the model's tokenizer does not know {share:.0%} of the words or characters of these texts and reads all of them as "
            "the same unknown token; use a model that was pre-trained on texts like them."
        ]

    def digested(self) -> Sequence[bytes | np.ndarray]:
        numbers = [] if self.numbers is None else [self.numbers]
        features = (self.encoded.features[name].values for name in sorted(self.encoded.features))
        lengths = np.asarray(self.lengths, dtype=np.int64)
        return [*numbers, lengths, *(values.astype(np.int32) for values in features)]


class TextTask(Task):
    """Base of tasks whose input is the column `text` and, if there is one, `text_pair`."""

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        """Return the rows for a list of texts or pairs, or for a single pair; None for anything else. Raise `UserError`
        for an empty text."""
        if not items:
            raise UserError("there are no texts to predict; give one or more, or --data FILE.")
        if "text_pair" in columns and all(isinstance(text, str) for text in items):
            if len(items) != 2:
                raise UserError(
                    f"this run was trained on pairs of texts: give two, TEXT and TEXT_PAIR (got {len(items)}), or "
                    "--data FILE; in Python, give a list of pairs."
                )
            items = [tuple(items)]
        check_kinds(items, (str,))
        single = all(isinstance(text, str) for text in items)
        if not single and not all(isinstance(pair, tuple | list) for pair in items):
            return None
        for number, pair in enumerate(items if not single else (), start=1):
            if len(pair) != 2:
                raise UserError(
                    f"item {number} of {len(items)} has {len(pair)} text{'s' * (len(pair) != 1)}; it must have two."
                )
            check_texts(pair, f"pair {number} of {len(items)}", ("first text", "second text"))
        if not single and "text_pair" not in columns:
            raise UserError("this run was trained on single texts, not on pairs; give a list of texts.")
        names = [columns[name] for name in ("text", "text_pair") if name in columns]
        rows = [dict(zip(names, [item] if single else item)) for item in items]
        for number, row in enumerate(rows, start=1):
            if any(isinstance(text, str) and not text.strip() for text in row.values()):
                raise UserError(f"text {number} of {len(rows)} is empty; remove it, or fill it in.")
        return rows

    def divide(self, dataset: Dataset, row: int, backbone: Backbone, inputs: dict[str, Tensor]) -> Cut:
        tokenizer, values = tokenizer_of(backbone, self), dataset.examples.values
        texts: dict[str, str] = {name: values[name][row] for name in ("text", "text_pair") if name in values}
        around = Around.of(tokenizer)
        given = {name: around.taken_off(text) for name, text in texts.items()}
        encoding = encode_alone(
            tokenizer, list(given.values()), inputs["input_ids"].shape[1], backbone.source
        )
        shifts = [text.find(given[name]) for name, text in texts.items()]
        return words_of(texts, encoding.sequence_ids(0), encoding["offset_mapping"][0], shifts)

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        return '"a text" "its pair"' if "text_pair" in columns else '"a text"'

    def made_up(self, columns: Mapping[str, str], labels: Sequence[str]) -> list[Any]:
        texts = made_up_texts(labels)
        return list(zip(texts, texts[::-1])) if "text_pair" in columns else texts


def encode_alone(tokenizer: Any, texts: Sequence[str], length: int, source: str) -> Any:
    """Return the encoding of one text or pair with the characters of its tokens, cut to `length` tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {source} does not say which characters its tokens stand for, which explaining an answer by "
            "words needs; use a model with a fast tokenizer (tokenizer.json)."
        )
    return tokenizer(
        *([text] for text in texts),
        truncation=True,
        max_length=length,
        return_offsets_mapping=True,
        verbose=False,
    )


def words_of(
    texts: Mapping[str, str], sequences: Sequence[int | None], offsets: Sequence[tuple[int, int]],
    shifts: Sequence[int] = (0, 0),
) -> Cut:  # fmt: skip
    """Divide the tokens of a text or pair into words.

    `texts`: by column. `sequences`: the text of each token, None for special ones. `offsets`: the characters of each token
    in its text, which was encoded from character `shifts` on.
    """
    parts: list[dict[str, Any]] = []
    owners = np.full(len(sequences), -1, np.int64)
    for number, (name, text) in enumerate(texts.items()):
        mine = [place for place, sequence in enumerate(sequences) if sequence == number]
        spans, of = assign(
            split_words(text),
            [(offsets[i][0] + shifts[number], offsets[i][1] + shifts[number]) for i in mine],
        )
        owners[mine] = [word + len(parts) if word >= 0 else -1 for word in of]
        column = {"column": name} if len(texts) > 1 else {}
        parts += [{"text": text[a:b], "start": a, "end": b, **column} for a, b in spans]
    return Cut(parts, owners)


def made_up_texts(labels: Sequence[str]) -> list[str]:
    """Return made-up texts on which an export and its run are compared if the run's rows no longer exist."""
    return [f"{label}: how does this compare?" for label in labels or ("an export",)]


def tokenizer_of(backbone: Backbone, task: Task) -> Any:
    """Return the tokenizer of a backbone. Raises `UserError` if it has none."""
    if backbone.processor is None or not hasattr(backbone.processor, "pad_token_id"):
        raise UserError(f"{backbone.source} has no tokenizer, which {task.name}() needs.")
    return backbone.processor


def text_problem(table: Table, column: str, row: int) -> str | None:
    """Return what is wrong with the text in a column of a row, or None."""
    value = table.columns[column][row]
    if is_missing(value):
        return f"{table.where(row)}: column {column!r} is empty."
    if isinstance(value, str) and not is_unicode(value):
        return f"{table.where(row)}: column {column!r} is not valid Unicode: it has half of a surrogate pair."
    if not isinstance(value, str | int | float):
        return f"{table.where(row)}: column {column!r} is a {type(value).__name__}, not a text."
    return None


def read_texts(
    table: Table, columns: dict[str, str], wrong: Callable[[int], str | None] | None, skip_bad: bool
) -> tuple[Table, dict[str, list[Any]], tuple[str, ...]]:
    """Return the valid rows as a table, their texts by column, and a message for each bad row.

    `wrong` returns what is wrong with the rest of a row, or None. Raises `UserError` as `check_rows` does.
    """
    names = [name for name in ("text", "text_pair") if name in columns]

    def problem(row: int) -> str | None:
        found = (text_problem(table, columns[name], row) for name in names)
        first = next((text for text in found if text is not None), None)
        return first if first is not None or wrong is None else wrong(row)

    kept, skipped = check_rows(table, problem, skip_bad)
    return kept, {name: [str(value) for value in kept.columns[columns[name]]] for name in names}, skipped


def encode(
    task: Task, examples: Examples, backbone: Backbone, max_length: int, numbers: np.ndarray | None
) -> TextDataset:
    """Tokenize the texts, or pairs of texts, of the examples. `numbers`: targets (rows, ...), if there are any."""
    values = examples.values
    encoded = encode_texts(tokenizer_of(backbone, task), values["text"], values.get("text_pair"), max_length)
    check_encoded(backbone, encoded, examples.where)
    return TextDataset(examples, encoded, numbers)


def check_encoded(backbone: Backbone, encoded: Encoded, where: Callable[[int], str]) -> None:
    """Raise `UserError` for token ids or token types that the model has no embedding for."""
    check_token_ids(backbone, encoded.features["input_ids"], where)
    check_token_types(backbone, encoded.features.get("token_type_ids", ()))
