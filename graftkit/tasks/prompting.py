"""Prompting an unchanged pre-trained model with a hard prompt and in-context examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from graftkit.backbone import Backbone
from graftkit.errors import UserError
from graftkit.recipe.catalogue import option
from graftkit.tasks.base import Dataset, Examples
from graftkit.tasks.shared.prompts.asking import Asking
from graftkit.tasks.shared.prompts.rows import Prompts, PromptTask
from graftkit.tasks.shared.prompts.template import check_shots, draw_shots, template_for, words_for


@dataclass(frozen=True)
class Prompting(PromptTask):
    """Classification by prompting the unchanged pre-trained model, with in-context examples; nothing is trained.

    A label is scored by the probability of its word after the prompt (causal models) or in place of a mask (masked models,
    Schick and Schütze 2021). `calibrate` divides the probabilities by those for a content-free prompt (Zhao et al. 2021,
    "Calibrate Before Use").
    """

    trains: ClassVar[bool] = False

    shots: int = option(
        0, "number of in-context examples, drawn at random from the training rows", at_least=0
    )
    shown: tuple | None = option(
        None, "in-context examples, [text, label] or [text, text_pair, label]; null: drawn at random"
    )
    separator: str = option("\n\n", "text between examples")
    calibrate: bool = option(False, "subtract the words' scores for a content-free prompt")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shown is not None and self.shots not in (0, len(self.shown)):
            raise UserError(
                f"prompting(): shots is {self.shots}, but shown holds {len(self.shown)} examples; leave shots out."
            )

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

    def asking(self, backbone: Backbone, max_length: int, columns: Sequence[str]) -> Asking:
        assert self.words is not None and self.shown is not None  # since `resolve`
        return Asking(
            self.form, self.words, self.shown, self.separator, self.score, backbone, self, max_length, columns
        )

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        asking, prompts = self.prompts(examples, backbone, max_length)
        return Prompts(examples, prompts, asking, self.calibrate)

    def rendered(self, dataset: Dataset) -> str:
        assert isinstance(dataset, Prompts)
        text = super().rendered(dataset)
        if dataset.dropped:
            text += (
                f"\n\n({dataset.dropped} of {len(dataset)} rows have no room for all {self.shots} examples in "
                f"{dataset.asking.max_length} tokens, and are asked with fewer; see data.max_length)"
            )
        return text

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        assert isinstance(dataset, Prompts)
        return super().statistics(dataset, labels) | {"rows_with_fewer_examples": dataset.dropped}
