"""Base of tasks that ask a language model for the word of a label, and the prompts of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from graftkit.recipe.catalogue import option
from graftkit.tasks.base import Dataset, Examples
from graftkit.tasks.shared.labels import LABEL, LabelTask
from graftkit.tasks.shared.prompts.asking import Asking
from graftkit.tasks.shared.prompts.scores import Prompt
from graftkit.tasks.shared.prompts.template import Template, read_template
from graftkit.tasks.shared.texts import FIRST, SECOND, TEXT, TextTask, read_texts


class Prompts(Dataset):
    """The prompt of each row, as token ids."""

    keeps = False  # a row can be several for the model

    def __init__(
        self, examples: Examples, prompts: Sequence[Prompt], asking: Asking, calibrate: bool = False
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
class PromptTask(TextTask, LabelTask):
    """Base of tasks that score each label by its word in a prompt. A subclass says in `asking` how prompts are built."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", (*FIRST, *TEXT), "text"),
        Column("text_pair", SECOND, "text", required=False),
        Column("label", LABEL, "label"),
    )
    head: ClassVar[bool] = False
    calibrates: ClassVar[str | None] = "label"
    families: ClassVar[tuple[str, ...]] = ("MASKED_LM", "CAUSAL_LM")

    template: str | None = option(
        None,
        "the prompt, with {text}, {text_pair} and {label}; [MASK] is {label}; null: 'Text: {text}\\nLabel: {label}'",
    )
    words: dict | None = option(None, "the word of each label, {label: word}; null: the labels themselves")
    score: str = option(
        "sum", "sum or mean of the log-probabilities of a word's tokens", choices=("sum", "mean")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None:
            read_template(self.template)

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

    def asking(self, backbone: Backbone, max_length: int, columns: Sequence[str]) -> Asking:
        """Return the prompt with its words and examples for the tokenizer of a model."""
        raise NotImplementedError

    def prompts(self, examples: Examples, backbone: Backbone, max_length: int) -> tuple[Asking, list[Prompt]]:
        """Return the prompt of each row. Raises `UserError` for a token that the model has no embedding for."""
        asking = self.asking(backbone, max_length, tuple(examples.values))
        prompts = asking.prompts(examples)
        for form in asking.lengths:
            check_token_ids(backbone, (prompt.ids[form] for prompt in prompts), examples.where)
        check_token_ids(backbone, asking.words, lambda i: f"words: the one of {list(self.words or ())[i]!r}")
        return asking, prompts

    def rendered(self, dataset: Dataset) -> str:
        assert isinstance(dataset, Prompts)
        return dataset.asking.rendered(dataset.prompts[0])
