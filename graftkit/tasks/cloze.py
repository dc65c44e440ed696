"""Classification as a cloze: a trained language model fills in the word of a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from graftkit.backbone import Backbone
from graftkit.tasks.base import Dataset, Examples
from graftkit.tasks.shared.prompts.asking import Asking
from graftkit.tasks.shared.prompts.rows import Prompts, PromptTask
from graftkit.tasks.shared.prompts.template import template_for, words_for


@dataclass(frozen=True)
class Cloze(PromptTask):
    """One of several labels for a text or a pair of texts, as the word that fills in a template.

    The task has the form of the model's pre-training and adds no head: the scores of the labels' words, in place of a mask
    (masked models), in a blank (GLM) or after the prompt (causal models), are trained with cross-entropy over the labels
    (Schick and Schütze 2021, equation 2; for GLM Du et al. 2022, section 2.4).
    """

    method: ClassVar[str] = "lora()"

    def resolve(self, examples: Examples, labels: Sequence[str], seed: int) -> Cloze:
        """Fill in the template and a word for each label."""
        template = template_for(self.template, tuple(examples.values))
        return replace(self, template=template, words=words_for(self.words, labels))

    def asking(self, backbone: Backbone, max_length: int, columns: Sequence[str]) -> Asking:
        assert self.words is not None  # since `resolve`
        return Asking(self.form, self.words, (), "", self.score, backbone, self, max_length, columns)

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        asking, prompts = self.prompts(examples, backbone, max_length)
        return Prompts(examples, prompts, asking)
