"""Tagged texts as rows of a dataset: their parts, and merging the answers to the parts of an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.data.encode import Encoded
from graftkit.data.ragged import Ragged
from graftkit.tasks.base import Dataset, Examples, Task
from graftkit.tasks.shared.texts import TextDataset
from graftkit.tasks.tag.entities import bio, chunks, types_of
from graftkit.tasks.tag.rows import entities_of
from graftkit.tasks.tag.words import Part, Spans

IGNORED = -100


class TagDataset(TextDataset):
    """Parts of sentences, with a label at the first token of each word and -100 at all other tokens.

    `spans`: character spans of the words of each example; `parts`: one row each.
    """

    def __init__(
        self, examples: Examples, texts: list[str], spans: list[Spans], parts: list[Part], padding: int
    ) -> None:
        ids = Ragged([part.ids for part in parts])
        features = {"input_ids": ids, "attention_mask": ids.like(np.ones_like(ids.values))}
        cut = len({part.example for part in parts if part.cut})
        self.labels: Ragged | None = None
        units = None
        if examples.targets is not None:
            self.labels = Ragged([_labelled(part, examples.targets[part.example]) for part in parts])
            units = np.array([float((labels != IGNORED).sum()) for labels in self.labels])
        super().__init__(examples, Encoded(features, ids.lengths, cut, {"input_ids": padding}), units=units)
        self.texts, self.spans, self.parts = texts, spans, parts

    def targets(self, rows: np.ndarray) -> Tensor | None:
        """Return label indices (rows, length)."""
        if self.labels is None:
            return None
        return torch.from_numpy(self.labels.padded(rows, IGNORED))

    def where(self, row: int) -> str:
        return self.examples.where(self.parts[row].example)

    def example(self, row: int) -> int:
        return self.parts[row].example

    def about(self, row: int, number: int) -> dict[str, Any]:
        """Return the word, with its characters in the text, that has the label `number` of a part."""
        part = self.parts[row]
        mine = np.flatnonzero(part.own)
        word = int(part.words[mine[np.argsort(part.places[mine], kind="stable")[number]]])
        start, end = self.spans[part.example][word]
        return {"word": self.texts[part.example][start:end], "start": start, "end": end}

    def digested(self) -> Sequence[bytes | np.ndarray]:
        return [*super().digested(), *([] if self.labels is None else [self.labels.values])]


def _labelled(part: Part, labels: np.ndarray) -> np.ndarray:
    found = np.full(len(part.ids), IGNORED, dtype=np.int64)
    found[part.places[part.own]] = labels[part.words[part.own]]
    return found


@dataclass(frozen=True)
class Answer:
    """The answer to one example: a label, its probability and the loss for each word, nan if a word has none."""

    labels: np.ndarray
    probabilities: np.ndarray
    losses: np.ndarray


def rejoined(outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]) -> list[Answer]:
    """Merge the answers to the parts of each example. Entity tags are converted to valid BIO.

    A word without its own token continues the entity around it, or is outside of any entity.
    """
    assert isinstance(dataset, TagDataset)
    answers = [
        Answer(np.full(len(spans), -1), np.zeros(len(spans)), np.full(len(spans), np.nan)) for spans in dataset.spans
    ]  # fmt: skip
    types = types_of(labels)
    for part, outcome in zip(dataset.parts, outcomes):
        answer = answers[part.example]
        numbers = outcome[:, 0].astype(np.int64)
        if types:  # a token over several words begins one entity
            numbers = np.where(~part.own & (numbers % 2 == 1), numbers + 1, numbers)
        answer.labels[part.words], answer.probabilities[part.words] = numbers, outcome[:, 1]
        answer.losses[part.words] = outcome[:, 2]
    numbers_of_tags = {tag: number for number, tag in enumerate(labels)}
    for answer in answers:
        _fill(answer.labels, bool(types))
        if types:
            tags = bio(chunks([labels[number] for number in answer.labels]), len(answer.labels))
            answer.labels[:] = [numbers_of_tags[tag] for tag in tags]
    return answers


def unsure_texts(task: Task, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]) -> np.ndarray:
    """Return 1 minus the geometric mean of the probabilities of each text's tags, (texts,): Shen et al. 2018, "Deep Active
    Learning for Named Entity Recognition", choose texts by its logarithm."""
    answers = rejoined(outcomes, dataset, labels)
    found = np.zeros(len(answers))
    for i, answer in enumerate(answers):
        known = answer.probabilities[answer.probabilities > 0]  # a word without a token has none
        found[i] = 1 - np.exp(np.log(known).mean()) if len(known) else 0.0
    return found


def _fill(numbers: np.ndarray, entities: bool) -> None:
    """Fill in labels of words without a token: I within an entity, else O or the first label."""
    known = np.flatnonzero(numbers >= 0)
    for i in np.flatnonzero(numbers < 0):
        place = int(np.searchsorted(known, i))
        behind = numbers[known[place]] if place < len(known) else 0
        before = numbers[i - 1] if i else 0
        goes_on = entities and behind > 0 and behind % 2 == 0 and before in (behind, behind - 1)
        numbers[i] = behind if goes_on else 0


def marks(
    dataset: TagDataset, i: int, numbers: np.ndarray, labels: Sequence[str], other: np.ndarray
) -> list[list[Any]]:
    """Return the entities, or the words in which two answers differ, as [start, end, label] in characters of the text."""
    spans, tags = dataset.spans[i], [labels[number] for number in numbers]
    if types_of(labels):
        return [[e["start"], e["end"], e["label"]] for e in entities_of(tags, dataset.texts[i], spans)]
    return [[*span, tag] for span, tag, x, y in zip(spans, tags, numbers, other) if x != y]


def said(dataset: TagDataset, i: int, numbers: np.ndarray, labels: Sequence[str], other: np.ndarray) -> str:
    """Format the entities, or the tags of the words in which two answers differ."""
    text, spans, tags = dataset.texts[i], dataset.spans[i], [labels[number] for number in numbers]
    if types_of(labels):
        return (
            ", ".join(f"[{e['text']}]({e['label']})" for e in entities_of(tags, text, spans)) or "no entity"
        )
    return " ".join(f"{text[a:b]}/{tag}" for (a, b), tag, x, y in zip(spans, tags, numbers, other) if x != y)
