"""Blank infilling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graftkit.backbone import Backbone
from graftkit.data.read import Table
from graftkit.data.source import Batch
from graftkit.data.stream import stream_table
from graftkit.errors import UserError
from graftkit.recipe.catalogue import option
from graftkit.tasks.base import Calls, Dataset, Examples, Reading
from graftkit.tasks.objectives.base import Objective, TokenRows
from graftkit.tasks.objectives.documents import CorpusTable, Documents, Texts
from graftkit.tasks.objectives.glm_rows import BlankRows
from graftkit.tasks.shared.blanks import marks_of
from graftkit.tasks.shared.filling import Sampling, filled, prompt_of, write_blanks
from graftkit.tasks.shared.items import check_kinds, check_texts
from graftkit.tasks.shared.texts import read_texts, tokenizer_of

SHORTEST = 16  # tokens of a row


class Prompts(Dataset):
    """Texts with blanks to fill. `prompts`: part A of each, (tokens,)."""

    keeps = False

    def __init__(self, examples: Examples, prompts: Sequence[np.ndarray], tokenizer: Any) -> None:
        super().__init__(examples, np.array([len(prompt) for prompt in prompts]))
        self.prompts, self.tokenizer = prompts, tokenizer

    def digested(self) -> Sequence[bytes | np.ndarray]:
        return list(self.prompts)


@dataclass(frozen=True)
class Glm(Objective):
    """Write what is missing from a text, blank after blank (GLM, Du et al. 2022).

    `mode='token'`: spans of Poisson(3) tokens, 15% of the text; `'sentence'`: whole sentences, 15%; `'document'`: one
    passage of 25 to 100%, half of the time the end; `'mixture'`: one of these for each row, with shares 0.5, 0.3 and 0.2.
    The masks [MASK], [sMASK] and [gMASK] tell the three apart. Evaluation leaves out the same spans each time, in the order
    of the text, in token mode unless there is only another one. A finished run fills the blanks of texts.
    """

    families: ClassVar[tuple[str, ...]] = ("MASKED_LM",)
    geometry: ClassVar[str] = "glm"
    special_tokens: ClassVar[tuple[str, ...]] = (
        "[MASK]", "[sMASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>", "[dBLOCK]",
    )  # fmt: skip
    scored: ClassVar[float] = 0.2  # 15% of the text, and an end of each blank
    headline: ClassVar[tuple[str, ...]] = ("loss", "token_accuracy", "bits_per_byte")
    using: ClassVar[tuple[str, ...]] = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")

    mode: str = option(
        "token", "what is left out of a text", choices=("token", "sentence", "document", "mixture")
    )
    shuffle: bool = option(
        True, "write the blanks in random order, so that each is learned given any of the others"
    )
    block: float = option(
        0.1, "token mode: share of the tokens of blanks that are hidden from those after them, as [dBLOCK]",
        at_least=0, below=1,
    )  # fmt: skip
    max_new_tokens: int = option(64, "maximum length of a blank that is filled", at_least=1)
    temperature: float = option(0.0, "sampling temperature; 0 means greedy decoding", at_least=0)
    top_p: float = option(
        1.0, "sample from the most likely tokens with this total probability", above=0, at_most=1
    )
    top_k: int = option(0, "sample from this many most likely tokens; 0 for all", at_least=0)
    seed: int = option(0, "random seed of sampling", at_least=0)

    @property
    def sentences(self) -> bool:
        return self.mode in ("sentence", "mixture")

    # ---- pre-training

    def refuse(self, tokenizer: Any, backbone: Backbone) -> None:
        if not getattr(backbone.model, "fills_blanks", False):
            raise UserError(
                f"{self.name}() pre-trains a GLM, but {backbone.source} is a {type(backbone.model).__name__}. Begin with a new "
                "model, such as size=glm-mini, or with one of an earlier run."
            )
        marks_of(tokenizer, f"{self.name}()")

    def rows(
        self, examples: Documents, texts: Texts, backbone: Backbone, max_length: int, training: bool
    ) -> TokenRows:
        if max_length < SHORTEST:
            raise UserError(
                f"data.max_length is {max_length}, but {self.name}() needs at least {SHORTEST} tokens for a text and its blanks."
            )
        tokenizer = backbone.processor
        evaluated = "token" if self.mode == "mixture" else self.mode
        two = backbone.model.config.block_positions  # type: ignore[union-attr]
        return BlankRows(
            examples, texts, tokenizer, max_length, marks_of(tokenizer, f"{self.name}()"), two=bool(two),
            mode=self.mode if training else evaluated, shuffle=self.shuffle and training,
            block=self.block if training else 0.0,
        )  # fmt: skip

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        found = super().statistics(dataset, labels)
        return found | ({"dropped_tokens": dataset.dropped} if isinstance(dataset, BlankRows) else {})

    # ---- filling blanks with a finished run

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        if not items:
            raise UserError("there is no text to fill in; give one or more with [MASK], or --data FILE.")
        check_kinds(items, (str,))
        if not isinstance(items[0], str):
            return None
        check_texts(items, "the texts")
        return [{columns["text"]: text} for text in items]

    def pieces(self, source: Any, reading: Reading, name: str, rows: int) -> Iterator[Table]:
        """Yield rows with a text each, unlike `read`, which reads a corpus."""
        return stream_table(
            source, encoding=reading.encoding, skip_bad=reading.skip_bad, name=name, rows=rows
        )

    def examples(
        self, table: Table, columns: dict[str, str], labels: Sequence[str], skip_bad: bool, targets: bool = True,
    ) -> Examples:  # fmt: skip
        if isinstance(table, CorpusTable):
            return super().examples(table, columns, labels, skip_bad, targets)
        kept, values, skipped = read_texts(table, columns, None, skip_bad)
        return Examples(kept, values, None, skipped)

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        if isinstance(examples, Documents):
            return super().dataset(examples, backbone, max_length, training)
        tokenizer, model = tokenizer_of(backbone, self), backbone.model
        marks = marks_of(tokenizer, f"{self.name}()")
        texts = enumerate(examples.values["text"])
        prompts = [prompt_of(text, tokenizer, marks, model, examples.where(i)) for i, text in texts]
        return Prompts(examples, prompts, tokenizer)

    def outcomes(self, forward: Calls, batch: Batch) -> Sequence[Any]:
        dataset = batch.source
        if not isinstance(dataset, Prompts):
            return super().outcomes(forward, batch)
        how = Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.seed)
        half = getattr(forward, "precision", "fp32") != "fp32"
        tokenizer, prompts = dataset.tokenizer, [dataset.prompts[row] for row in batch.rows]
        return write_blanks(
            forward.graft.model, tokenizer, marks_of(tokenizer, f"{self.name}()"), prompts, how, half
        )

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return each text with its blanks filled in, and the blanks."""
        assert isinstance(dataset, Prompts)
        texts = dataset.examples.values["text"]
        found = [filled(text, blanks, dataset.tokenizer) for text, blanks in zip(texts, outcomes)]
        return [{"filled": one.text, "blanks": list(one.blanks)} for one in found]

    def line(self, answer: dict[str, Any]) -> str:
        return str(answer["filled"])

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        return '"a text with [MASK]"'
