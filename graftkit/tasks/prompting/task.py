"""Prompting an unchanged pre-trained model with a hard prompt and in-context examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.fit import check_token_ids
from graftkit.data.columns import Column
from graftkit.data.read import Table
from graftkit.data.source import Batch, Pass
from graftkit.errors import UserError
from graftkit.recipe.catalogue import option
from graftkit.tasks.base import Dataset, Examples
from graftkit.tasks.prompting.asking import Asking
from graftkit.tasks.prompting.scores import Prompt
from graftkit.tasks.prompting.template import (
    Template,
    check_shots,
    draw_shots,
    read_template,
    template_for,
    words_for,
)
from graftkit.tasks.shared.labels import LABEL, LabelTask
from graftkit.tasks.shared.texts import FIRST, SECOND, TEXT, TextTask, read_texts


class Prompts(Dataset):
    """The prompt of each row, as token ids."""

    keeps = False  # a row can be several for the model

    def __init__(
        self, examples: Examples, prompts: Sequence[Prompt], asking: Asking, calibrate: bool
    ) -> None:
        super().__init__(examples, np.array([prompt.length for prompt in prompts]))
        self.prompts = prompts
        self.asking = asking
        self.calibrate = calibrate
        self.truncated = sum(prompt.cut for prompt in prompts)
        self._empty: dict[int, Tensor] = {}

    @property
    def dropped(self) -> int:
        """Number of rows whose prompt has no room for all examples."""
        return sum(prompt.shots < len(self.asking.shots) for prompt in self.prompts)

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        return self.asking.padded([self.prompts[row] for row in rows])

    def targets(self, rows: np.ndarray) -> Tensor | None:
        targets = self.examples.targets
        return None if targets is None else torch.from_numpy(np.asarray(targets)[rows])

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return scores of the labels' words, (rows, labels); with `calibrate` minus those for content-free prompts."""
        prompts = [self.prompts[row] for row in batch.rows]
        scores = self.asking.scores(model, prompts, batch.move)
        if not self.calibrate:
            return scores
        for count in {prompt.shots for prompt in prompts} - set(self._empty):
            empty = self.asking.scores(model, self.asking.without_content(count), batch.move)
            self._empty[count] = empty.softmax(dim=1).mean(dim=0).log()
        return scores - torch.stack([self._empty[prompt.shots] for prompt in prompts])

    def digested(self) -> Sequence[bytes | np.ndarray]:
        targets = self.examples.targets
        ids = (ids for prompt in self.prompts for ids in prompt.ids.values())
        return [*([] if targets is None else [np.asarray(targets)]), self.lengths.astype(np.int64), *ids]


@dataclass(frozen=True)
class Prompting(TextTask, LabelTask):
    """Classification by prompting the unchanged pre-trained model, with in-context examples; nothing is trained.

    A label is scored by the probability of its word after the prompt (causal models) or in place of a mask (masked models,
    Schick and Schütze 2021). `calibrate` divides the probabilities by those for a content-free prompt (Zhao et al. 2021,
    "Calibrate Before Use").
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", (*FIRST, *TEXT), "text"),
        Column("text_pair", SECOND, "text", required=False),
        Column("label", LABEL, "label"),
    )
    head: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ("MASKED_LM", "CAUSAL_LM")

    template: str | None = option(
        None,
        "the prompt, with {text}, {text_pair} and {label}; [MASK] is {label}; null: 'Text: {text}\\nLabel: {label}'",
    )
    words: dict | None = option(None, "the word of each label, {label: word}; null: the labels themselves")
    shots: int = option(
        0, "number of in-context examples, drawn at random from the training rows", at_least=0
    )
    shown: tuple | None = option(
        None, "in-context examples, [text, label] or [text, text_pair, label]; null: drawn at random"
    )
    separator: str = option("\n\n", "text between examples")
    score: str = option(
        "sum", "sum or mean of the log-probabilities of a word's tokens", choices=("sum", "mean")
    )
    calibrate: bool = option(False, "subtract the words' scores for a content-free prompt")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None:
            read_template(self.template)
        if self.shown is not None and self.shots not in (0, len(self.shown)):
            raise UserError(
                f"prompting(): shots is {self.shots}, but shown holds {len(self.shown)} examples; leave shots out."
            )

    @cached_property
    def form(self) -> Template:
        assert self.template is not None  # since `resolve`
        return read_template(self.template)

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        wrong = self.wrong(table, columns, labels) if targets else None
        kept, values, skipped = read_texts(table, columns, wrong, skip_bad)
        return Examples(kept, values, self.numbers(kept, columns, labels) if targets else None, skipped)

    def resolve(self, examples: Examples, labels: Sequence[str], seed: int) -> Prompting:
        """Fill in the whole prompt: template, a word for each label, and the in-context examples."""
        columns = tuple(examples.values)
        shown = (
            draw_shots(examples, labels, self.shots, seed)
            if self.shown is None
            else check_shots(self.shown, columns, labels)
        )
        return replace(
            self,
            template=template_for(self.template, columns),
            words=words_for(self.words, labels),
            shown=shown,
            shots=len(shown),
        )

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        assert self.words is not None and self.shown is not None  # since `resolve`
        asking = Asking(
            self.form, self.words, self.shown, self.separator, self.score, backbone, self, max_length,
            tuple(examples.values),
        )  # fmt: skip
        prompts = asking.prompts(examples)
        for form in asking.lengths:
            check_token_ids(backbone, (prompt.ids[form] for prompt in prompts), examples.where)
        check_token_ids(backbone, asking.words, lambda i: f"words: the one of {list(self.words or ())[i]!r}")
        return Prompts(examples, prompts, asking, self.calibrate)

    def rendered(self, dataset: Dataset) -> str:
        assert isinstance(dataset, Prompts)
        text = dataset.asking.rendered(dataset.prompts[0])
        if dataset.dropped:
            text += (
                f"\n\n({dataset.dropped} of {len(dataset)} rows have no room for all {self.shots} examples in "
                f"{dataset.asking.max_length} tokens, and are asked with fewer; see data.max_length)"
            )
        return text

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict:
        assert isinstance(dataset, Prompts)
        return super().statistics(dataset, labels) | {"rows_with_fewer_examples": dataset.dropped}
