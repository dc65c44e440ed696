"""Conversations as rows of a language model: token ids, the loss mask, and the positions of the logits of the targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.attention import keep_parts_apart
from graftkit.backbone.packed import Parts, packed
from graftkit.data.chat import Marked, Template, TemplateFails, Tools, tokens_of
from graftkit.data.doubled import Around
from graftkit.data.messages import Message
from graftkit.data.packing import leaks, pack, positions
from graftkit.data.ragged import Ragged, mask
from graftkit.data.source import Batch, Pass, identity_of
from graftkit.errors import UserError
from graftkit.tasks.base import Dataset, Examples
from graftkit.tasks.generate.text import Writing, decoder_start
from graftkit.tasks.shared.scores import token_scores

OPEN, CLOSE = "⟦", "⟧"  # around target tokens in a row that is shown
SHOWN = 2000  # maximum number of characters of a row that is shown


@dataclass(frozen=True)
class Dialogues(Examples):
    """Rows of conversations; `skip_bad`: skip those without target tokens.

    `targets`: the text of the last answer of each conversation. `last`: only that answer is trained on.
    """

    skip_bad: bool = False
    last: bool = False


@dataclass(frozen=True)
class Written:
    """One row in tokens: `ids` and the loss mask `learned`, both (tokens,), and the `prompt` to generate from."""

    ids: np.ndarray
    learned: np.ndarray
    prompt: np.ndarray


class GenerateDataset(Dataset):
    """Rows of a causal language model, of one conversation each or, packed, of several in sequence.

    `prompts`: prompt of each example for generation; `writing`: generation settings, if texts are generated. `smoothed`: the
    loss needs the mean over the vocabulary.
    """

    smoothed = False

    def __init__(
        self, examples: Examples, rows: Sequence[Written], tokenizer: Any, groups: Sequence[Sequence[int]] | None = None,
        truncated: int = 0, writing: Writing | None = None,
    ) -> None:  # fmt: skip
        self.packed = groups is not None
        groups = [[i] for i in range(len(rows))] if groups is None else groups
        self.ids = Ragged([np.concatenate([rows[i].ids for i in group]) for group in groups])
        self.learned = Ragged([np.concatenate([rows[i].learned for i in group]) for group in groups])
        self.parts = Ragged([np.array([len(rows[i].ids) for i in group]) for group in groups])
        self.positions = self.ids.like(positions(self.parts.values).astype(np.int32))
        self.groups = groups
        units = np.array([float(learned.sum()) for learned in self.learned])
        super().__init__(examples, self._lengths(rows), units)
        self.prompts = Ragged([row.prompt for row in rows])
        self.tokenizer = tokenizer
        self.padding = tokenizer.pad_token_id or 0
        self.truncated = truncated
        self.writing = writing

    def _lengths(self, rows: Sequence[Written]) -> np.ndarray:
        return self.ids.lengths

    @property
    def answered(self) -> bool:
        return self.examples.targets is not None

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        """Return ids, padded on the right, and a mask; for packed rows position ids that restart with each row, which
        serve as the mask."""
        ids, lengths = self.ids.padded(rows, self.padding), self.ids.lengths[rows]
        if not self.packed:
            return _tensors(input_ids=ids, attention_mask=mask(lengths))
        behind = np.arange(ids.shape[1]) - lengths[:, None]  # the padding is one more part
        numbers = np.where(behind < 0, self.positions.padded(rows, 0), behind)
        return _tensors(input_ids=ids, position_ids=numbers)

    def targets(self, rows: np.ndarray) -> Tensor | None:
        return self.labels(rows) if self.answered else None

    def labels(self, rows: np.ndarray) -> Tensor:
        """Return the ids of all target tokens of these rows, one row after another."""
        return torch.from_numpy(self.ids.joined(rows)[self.learned.joined(rows)].astype(np.int64))

    def places(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return row in the batch and position of the logits that predict each target token: those of the token before."""
        numbers, at = self._learned(rows)
        return torch.from_numpy(numbers), torch.from_numpy(at - 1)

    def _learned(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return row in the batch and position of each target token."""
        lengths, learned = self.learned.lengths[rows], self.learned.joined(rows)
        numbers = np.repeat(np.arange(len(rows)), lengths)[learned]
        return numbers, positions(lengths)[learned]

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return `token_scores` of the target tokens, (labels, 2), or (labels, 3) if the loss is smoothed."""
        rows, places = map(batch.move, self.places(batch.rows))
        targets = batch.move(self.labels(batch.rows))
        with packed(self.apart(batch.rows) if self.packed else None):
            return token_scores(model, batch.inputs, rows, places, targets, mean=self.smoothed)

    def apart(self, rows: np.ndarray) -> Parts:
        """Return the parts of packed rows; the padding is one more."""
        longest = self.ids.lengths[rows].max()
        sizes = [[*self.parts[row].tolist(), int(longest - self.ids.lengths[row])] for row in rows]
        return Parts([[size for size in row if size] for row in sizes])

    def where(self, row: int) -> str:
        return "; ".join(self.examples.where(i) for i in self.groups[row])

    def identity(self, row: int, at: Pass) -> bytes | None:
        parts = {"parts": self.parts[row]} if self.packed else {}
        return identity_of({"input_ids": self.ids[row], **parts})

    def digested(self) -> Sequence[bytes | np.ndarray]:
        return [
            np.asarray(self.lengths, dtype=np.int64),
            self.ids.values,
            self.learned.values,
            self.parts.values,
        ]

    def shown(self, row: int) -> list[tuple[str, bool]]:
        """Return the text of a row, or of the first part of a packed row, in spans, each with whether it is a target."""
        part = slice(self.parts[row][0])
        return stretches(self.tokenizer, self.ids[row][part], self.learned[row][part])


class PromptedDataset(GenerateDataset):
    """Rows of an encoder, which reads the prompt, and a decoder, which writes the answer."""

    keeps = False  # two sequences in a row

    def __init__(self, *given: Any, start: int, **more: Any) -> None:
        super().__init__(*given, **more)
        before = np.empty_like(
            self.ids.values
        )  # each token that the decoder reads before it writes the one in `ids`
        before[1:] = self.ids.values[:-1]
        before[self.ids.offsets[:-1]] = start
        self.before = self.ids.like(before)

    def _lengths(self, rows: Sequence[Written]) -> np.ndarray:
        return self.ids.lengths + np.array([len(row.prompt) for row in rows])

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        return _tensors(
            input_ids=self.prompts.padded(rows, self.padding),
            attention_mask=mask(self.prompts.lengths[rows]),
            decoder_input_ids=self.before.padded(rows, self.padding),
        )

    def places(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        numbers, at = self._learned(rows)
        return torch.from_numpy(numbers), torch.from_numpy(at)

    def digested(self) -> Sequence[bytes | np.ndarray]:
        return [*super().digested(), self.prompts.values]

    def shown(self, row: int) -> list[tuple[str, bool]]:
        nothing = np.zeros(len(self.prompts[row]), dtype=bool)
        return [*stretches(self.tokenizer, self.prompts[row], nothing), *super().shown(row)]


def _tensors(**arrays: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def stretches(tokenizer: Any, ids: np.ndarray, learned: np.ndarray) -> list[tuple[str, bool]]:
    cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    return [(tokenizer.decode(ids[a:b].tolist()), bool(learned[a])) for a, b in pairwise(cuts) if b > a]


def marked_text(parts: Sequence[tuple[str, bool]]) -> str:
    """Return the text of a row with its targets between marks."""
    text = "".join(f"{OPEN}{part}{CLOSE}" if learned else part for part, learned in parts)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def conversation(examples: Examples, row: int) -> list[Message] | str:
    """Return the messages of a row, with the answer last if there is one; or a text without roles."""
    values = {name: column[row] for name, column in examples.values.items()}
    if "text" in values:
        return str(values["text"])
    messages = (
        list(values["messages"])
        if "messages" in values
        else [asking(values["prompt"], values.get("input", ""))]
    )
    if examples.targets is not None:
        messages.append(values.get("completion") or {"role": "assistant", "content": examples.targets[row]})
    return messages


def tools_of(examples: Examples, row: int) -> Tools:
    """Return the tools that the assistant may call in a row of messages."""
    return examples.values["tools"][row] if "tools" in examples.values else None


def asking(prompt: str, more: str) -> Message:
    """Return a user message; templates with a place for the input of an instruction find it under the key `input`."""
    parts = {"instruction": prompt, "input": more} if more else {}
    return {"role": "user", "content": f"{prompt}\n\n{more}" if more else prompt, **parts}


def causal_rows(
    examples: Dialogues, tokenizer: Any, template: Template, max_length: int, everything: bool, prompts: bool
) -> tuple[list[Written], list[str | None]]:
    """Tokenize each row, and return what is wrong with it, if anything. `prompts`: also tokenize the prompts alone."""
    marked, problems = _each(examples, lambda talk, tools: _mark(examples, talk, tools, template, everything))
    tokens = iter(tokens_of(tokenizer, [text for text in marked if text is not None]))
    asked = None
    if prompts and examples.targets is not None and "text" not in examples.values:
        opened, _ = _each(examples, lambda talk, tools: template.prompt(talk[:-1], tools))  # type: ignore[arg-type]
        asked = iter(tokens_of(tokenizer, [text for text in opened if text is not None]))
    rows = []
    for place, text in enumerate(marked):
        ids, learned = (
            (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)) if text is None else next(tokens)
        )
        prompt = ids if asked is None or text is None else next(asked)[0]
        rows.append(Written(ids, learned, prompt))
        if text is not None and examples.targets is not None:
            problems[place] = no_label(learned, max_length)
        elif text is not None and not len(ids):
            problems[place] = "it has no tokens"
    return rows, problems


def _mark(
    examples: Dialogues, talk: list[Message] | str, tools: Tools, template: Template, everything: bool
) -> Marked:
    answered = examples.targets is not None
    if isinstance(talk, str):
        return Marked(talk, ((0, len(talk)),), True, answered)
    if answered:
        return template.mark(talk, everything, tools, examples.last)
    return template.prompt(talk, tools)


def prompted_rows(
    examples: Dialogues, tokenizer: Any, template: Template, max_length: int
) -> tuple[list[Written], list[str | None]]:
    """Tokenize rows for an encoder, which reads the prompt, and a decoder, which writes the answer."""
    answered = examples.targets is not None

    def asked(talk: list[Message] | str, tools: Tools) -> str:
        assert not isinstance(talk, str)
        before = talk[:-1] if answered else talk
        return template.write(before, True, tools) if template.given else before[0]["content"]

    texts, problems = _each(examples, asked)
    rows, end, around = [], tokenizer.eos_token_id, Around.of(tokenizer)
    for place, text in enumerate(texts):
        prompt = np.array(tokenizer(around.taken_off(text or ""))["input_ids"], dtype=np.int32)
        ids, words = [end if end is not None else 0], 1
        if answered:
            found = tokenizer(
                text_target=around.taken_off(examples.targets[place] if examples.targets is not None else ""),
                return_special_tokens_mask=True,
            )  # type: ignore[index]
            ids, words = found["input_ids"], len(found["input_ids"]) - sum(found["special_tokens_mask"])
            ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
        rows.append(Written(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool), prompt))
        if text is not None and answered and not words:
            problems[place] = "its completion has no tokens, so there is nothing to learn"
    return rows, problems


def no_label(learned: np.ndarray, max_length: int) -> str | None:
    """Return why a row with this loss mask has nothing to learn; None if it has."""
    if learned[:max_length].any():
        return None
    if learned.any():
        return (
            f"nothing is left to learn of it: its completion begins after token {int(learned.argmax())}, and rows are "
            f"truncated to {max_length} tokens (data.max_length)"
        )
    return "it has no token to learn: its completion is empty, or nothing precedes it"


def _each(examples: Examples, make: Callable[[Any, Tools], Any]) -> tuple[list[Any], list[str | None]]:
    """Apply `make` to each conversation; also return the reason for each one whose template failed."""
    made: list[Any] = []
    problems: list[str | None] = []
    for row in range(len(examples)):
        try:
            made.append(make(conversation(examples, row), tools_of(examples, row)))
            problems.append(None)
        except TemplateFails as error:
            made.append(None)
            problems.append(str(error))
    return made, problems


def good_rows(
    examples: Dialogues, rows: Sequence[Written], problems: Sequence[str | None]
) -> tuple[Dialogues, list[Written]]:
    """Return the rows without a problem. Raises `UserError` for the first bad row unless bad rows are skipped."""
    found = [
        f"{examples.where(row)}: {problem}." for row, problem in enumerate(problems) if problem is not None
    ]
    if found and not examples.skip_bad:
        raise UserError(f"{found[0]} Fix the row, or skip bad rows with data.skip_bad=true.")
    good = [row for row, problem in enumerate(problems) if problem is None]
    if not good:
        raise UserError(f"{examples.table.source} has no good rows: {found[0]}")
    kept = examples.take(good) if found else examples
    assert isinstance(kept, Dialogues)
    return replace(kept, skipped=(*kept.skipped, *found)), [rows[row] for row in good]


def cut(rows: Sequence[Written], max_length: int, room: int | None, both: bool) -> tuple[list[Written], int]:
    """Truncate rows to `max_length` tokens and prompts to `room`; also return how many were truncated.

    Rows are cut at their end, prompts at their beginning, because the question is usually at the end; an encoder's prompt
    is cut at its end.
    """
    longest = min(max_length, room or max_length)
    result, truncated = [], 0
    for row in rows:
        prompt = row.prompt[:longest] if both else row.prompt[max(0, len(row.prompt) - longest) :]
        lost = len(row.ids) > max_length or len(prompt) < len(row.prompt)
        truncated += lost
        result.append(Written(row.ids[:max_length], row.learned[:max_length], prompt))
    return result, truncated


def packed_groups(task: Any, backbone: Backbone, rows: Sequence[Written], max_length: int) -> list[list[int]]:
    """Return the row numbers of each packed row. Raises `UserError` if the model would let rows attend to each other."""
    meta = next(backbone.model.parameters()).is_meta
    keep_parts_apart(backbone)
    reason = None if meta else leaks(backbone.model, [row.ids for row in rows])
    if reason is not None:
        raise UserError(
            f"{task.name}(packing=True): rows of {backbone.source} ({type(backbone.model).__name__}) cannot be packed: "
            f"{reason}. Leave packing out."
        )
    return pack([len(row.ids) for row in rows], max_length)


def start_of(backbone: Backbone) -> int:
    """Return the token that the decoder begins with. Raises `UserError` if the model's config has none."""
    start = decoder_start(backbone.model)
    if start is None:
        raise UserError(
            f"the config of {backbone.source} does not set the first token of its decoder (decoder_start_token_id)."
        )
    return start
