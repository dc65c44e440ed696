"""Masked language modelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.data.source import Batch, Pass
from graftkit.recipe.catalogue import option
from graftkit.tasks.objectives.base import PLACES, ROWS, TARGETS, Objective, TokenRows
from graftkit.tasks.objectives.documents import Documents, Joined, Texts
from graftkit.tasks.objectives.masking import (
    EVALUATED,
    MaskingOptions,
    Share,
    edges,
    masked,
    parse_share,
    vocabulary_of,
)
from graftkit.tasks.shared.bodies import scores_of_chosen


class MaskedRows(TokenRows):
    """Rows of one length cut from the documents in sequence, with a separator between two documents:
    [CLS] tokens [SEP] tokens [SEP] (the FULL-SENTENCES of RoBERTa, Liu et al. 2019, section 4.2).

    Each row has the same number of masked tokens. Tokens behind the last full row are left out (`dropped`).
    """

    def __init__(
        self, examples: Documents, texts: Texts, tokenizer: Any, max_length: int, task: Mlm, training: bool
    ) -> None:
        self.first, self.last = edges(tokenizer)
        around = (self.first is not None) + (self.last is not None)
        self.joined = Joined(texts, self.last)
        total = self.joined.total
        self.body = max(1, min(max_length - around, total))
        rows = total // self.body
        super().__init__(examples, texts, rows, self.body + around, int(texts.lengths.sum()))
        self.dropped = total - rows * self.body
        self.tokenizer, self.task = tokenizer, task
        self.vocabulary = vocabulary_of(tokenizer, f"{task.name}()", task.unit == "word")
        self.shares = parse_share(task.share, f"{task.name}()") if training else Share(EVALUATED, EVALUATED)

    def masked(self, at: Pass) -> int:
        """Return the number of masked tokens of each row at this point of a run."""
        return max(1, round(self.shares.at(at.progress) * self.body))

    def units_of(self, rows: np.ndarray, at: Pass) -> float:
        return float(self.masked(at) * len(rows))

    def text(self, row: int) -> np.ndarray:
        """Return the tokens of a row before any is masked, (length,)."""
        first, last = ([] if edge is None else [edge] for edge in (self.first, self.last))
        body = self.joined.tokens(row * self.body, (row + 1) * self.body)
        return np.concatenate([first, body, last]).astype(np.int64)

    def mask(self, ids: np.ndarray, row: int, at: Pass) -> tuple[np.ndarray, np.ndarray]:
        """Return a row with masks, and the positions of its target tokens in order."""
        task = self.task
        return masked(
            at.generator(row), ids, self.masked(at), self.vocabulary, task.unit, task.replace == "mask"
        )

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        texts = np.stack([self.text(int(row)) for row in rows])
        made = [self.mask(ids, int(row), at) for ids, row in zip(texts, rows)]
        numbers = np.repeat(np.arange(len(rows)), self.masked(at))
        places = np.concatenate([places for _, places in made])
        return {
            "input_ids": torch.from_numpy(np.stack([ids for ids, _ in made])),
            TARGETS: torch.from_numpy(texts[numbers, places]),
            ROWS: torch.from_numpy(numbers),
            PLACES: torch.from_numpy(places),
        }

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of the masked tokens, (targets, 2); the whole head runs on those alone."""
        given = batch.inputs
        return scores_of_chosen(model, self.model_inputs(batch), given[ROWS], given[PLACES], given[TARGETS])

    def where(self, row: int) -> str:
        return self.examples.where(int(self.texts.numbers[self.joined.document(row * self.body)]))

    def shown(self) -> str:
        return self.tokenizer.decode(
            self.inputs(np.zeros(1, dtype=np.int64), Pass())["input_ids"][0].tolist()
        )


@dataclass(frozen=True)
class Mlm(MaskingOptions, Objective):
    """Predict masked tokens (Devlin et al. 2018, section 3.1).

    Rows are cut from the documents in sequence. In each row the same number of tokens is masked, drawn anew in each epoch;
    evaluation always masks 15%, the same tokens each time.
    """

    families: ClassVar[tuple[str, ...]] = ("MASKED_LM",)
    accuracy: ClassVar[str] = "masked_accuracy"
    headline: ClassVar[tuple[str, ...]] = ("loss", "masked_accuracy", "bits_per_byte")

    unit: str = option(
        "token", "what is masked: single tokens, whole words or spans", choices=("token", "word", "span")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_share(self.share, f"{self.name}()")

    def refuse(self, tokenizer: Any, backbone: Backbone) -> None:
        vocabulary_of(tokenizer, f"{self.name}()", self.unit == "word")

    def rows(
        self, examples: Documents, texts: Texts, backbone: Backbone, max_length: int, training: bool
    ) -> TokenRows:
        return MaskedRows(examples, texts, backbone.processor, max_length, self, training)

    def statistics(self, dataset: Any, labels: Any) -> dict[str, Any]:
        return super().statistics(dataset, labels) | {"dropped_tokens": dataset.dropped}
