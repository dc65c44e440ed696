"""Masked language modelling and next sentence prediction."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.data.ragged import Ragged
from graftkit.data.source import Batch, Pass
from graftkit.errors import UserError
from graftkit.tasks.base import Dataset, Term, Terms
from graftkit.tasks.objectives.base import PLACES, ROWS, TARGETS, TOKENS, Objective, TokenRows, token_term
from graftkit.tasks.objectives.documents import Documents, Texts
from graftkit.tasks.objectives.masking import (
    EVALUATED,
    MaskingOptions,
    Share,
    masked,
    parse_share,
    vocabulary_of,
)
from graftkit.tasks.objectives.pairs import Pairs, Sentences, draw_pairs, truncated
from graftkit.tasks.shared.bodies import chosen_states
from graftkit.tasks.shared.scores import scores_of

NSP = "nsp"  # the term over pairs
ORDER = "order"  # of the inputs of a batch: 0 if the second segment follows the first, 1 if it is random
SPECIAL = 3  # [CLS] a [SEP] b [SEP]


class PairRows(TokenRows):
    """Pairs of segments: [CLS] a [SEP] b [SEP], padded to the longest of a batch.

    Pairs are drawn anew in each epoch, so their number varies a little; an epoch has as many rows as the first pass of seed 0
    has pairs, and takes those of its own pass in turn.
    """

    hidden = (TARGETS, ROWS, PLACES, ORDER)

    def __init__(
        self, examples: Documents, texts: Texts, tokenizer: Any, max_length: int, task: MlmNsp, training: bool
    ) -> None:
        self.sentences = Sentences(texts)
        _check(self.sentences, examples, task)
        self.most = max_length - SPECIAL
        self.pairs = functools.lru_cache(2)(self._pairs)
        super().__init__(
            examples, texts, len(self.pairs(Pass().seed, Pass().epoch)), max_length, int(texts.lengths.sum())
        )
        self.tokenizer, self.task = tokenizer, task
        self.vocabulary = vocabulary_of(tokenizer, f"{task.name}()")
        self.shares = parse_share(task.share, f"{task.name}()") if training else Share(EVALUATED, EVALUATED)

    def _pairs(self, seed: int, epoch: int) -> Pairs:
        return draw_pairs(self.sentences, self.most, Pass(seed, epoch))

    def drawn(self, rows: np.ndarray, at: Pass) -> tuple[Pairs, np.ndarray]:
        """Return the pairs of a pass, and which of them these rows are."""
        pairs = self.pairs(at.seed, at.epoch)
        return pairs, rows % len(pairs)

    def sizes_of(self, rows: np.ndarray, at: Pass) -> np.ndarray:
        """Return the tokens of these rows in a pass, (rows,)."""
        pairs, which = self.drawn(rows, at)
        return np.minimum(pairs.sizes[which], self.most) + SPECIAL

    def tokens(self, rows: np.ndarray) -> int:
        return int(self.sizes_of(rows, Pass()).sum())

    def masked_of(self, rows: np.ndarray, at: Pass) -> np.ndarray:
        """Return the number of masked tokens of these rows: as in BERT, a share of all tokens of a row, at least one."""
        return np.maximum(1, np.round(self.shares.at(at.progress) * self.sizes_of(rows, at))).astype(int)

    def units_of(self, rows: np.ndarray, at: Pass) -> float:
        return float(self.masked_of(rows, at).sum())

    def count(self, rows: np.ndarray, at: Pass) -> Mapping[str, float]:
        return {TOKENS: self.units_of(rows, at), NSP: float(len(rows))}

    def text(self, row: int, at: Pass) -> tuple[np.ndarray, int, bool]:
        """Return the tokens of a row before any is masked, where its second segment begins, and whether that is random."""
        pairs, (which,) = self.drawn(np.array([row]), at)
        a, b = (self.segment(*part[which].tolist()) for part in (pairs.a, pairs.b))
        a, b = truncated(at.generator(row, 2), a, b, self.most)
        first, last = [self.tokenizer.cls_token_id], [self.tokenizer.sep_token_id]
        return (
            np.concatenate([first, a, last, b, last]).astype(np.int64),
            len(a) + 2,
            bool(pairs.random[which]),
        )

    def segment(self, start: int, end: int) -> np.ndarray:
        """Return the tokens of some sentences in sequence."""
        return np.concatenate([self.texts.shards.tokens(int(n)) for n in self.sentences.numbers[start:end]])

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        texts = [self.text(int(row), at) for row in rows]
        counts = self.masked_of(rows, at)
        made = [
            masked(at.generator(int(row)), ids, int(n), self.vocabulary, "token", self.task.replace == "mask")
            for (ids, _, _), row, n in zip(texts, rows, counts)
        ]
        everything = np.arange(len(rows))
        ids = Ragged([ids for ids, _ in made])
        types = ids.like(
            np.concatenate([np.arange(len(ids)) >= begin for ids, begin, _ in texts]).astype(np.int64)
        )
        whole = np.arange(ids.lengths.max()) < ids.lengths[:, None]
        found = {
            "input_ids": ids.padded(everything, self.tokenizer.pad_token_id or 0),
            "token_type_ids": types.padded(everything, 0),
            "attention_mask": whole.astype(np.int64),
            TARGETS: np.concatenate([ids[places] for (ids, _, _), (_, places) in zip(texts, made)]),
            ROWS: np.repeat(everything, counts),
            PLACES: np.concatenate([places for _, places in made]),
            ORDER: np.array([random for _, _, random in texts], dtype=np.int64),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of the masked tokens, (targets, 2), and behind them the logits of the order, (rows, 2), in one
        row."""
        given: Any = batch.inputs
        with chosen_states(model.base_model, given[ROWS], given[PLACES]):  # type: ignore[arg-type]
            output: Any = model(**self.model_inputs(batch))
        scores = scores_of(output.prediction_logits[0], given[TARGETS])
        return torch.cat([scores.flatten(), output.seq_relationship_logits.float().flatten()])

    def where(self, row: int) -> str:
        pairs, (which,) = self.drawn(np.array([row]), Pass())
        document = int(np.searchsorted(self.sentences.begins, pairs.a[which, 0], side="right")) - 1
        return self.examples.where(int(self.sentences.documents[document]))

    def shown(self) -> str:
        return self.tokenizer.decode(
            self.inputs(np.zeros(1, dtype=np.int64), Pass())["input_ids"][0].tolist()
        )


def _check(sentences: Sentences, examples: Documents, task: MlmNsp) -> None:
    """Raise `UserError` for documents of which no pairs can be made."""
    part = " that are held out" if examples.held else ""
    if len(sentences) < 2:
        raise UserError(
            f"{task.name}() pairs sentences of different documents, but {examples.table.source} has {len(sentences)} "
            f"document{'s' * (len(sentences) != 1)} with text{part}. Split it differently (documents='paragraphs' or "
            "'lines'), add documents, or use mlm()."
        )
    if np.diff(sentences.begins).max() < 2:
        raise UserError(
            f"{task.name}() needs documents of several sentences, but each document of {examples.table.source}{part} has one, "
            "so no sentence follows another. Split it differently (documents='paragraphs' or 'file'), or use mlm()."
        )


@dataclass(frozen=True)
class MlmNsp(MaskingOptions, Objective):
    """Predict masked tokens, and whether a segment follows another: BERT's own pre-training (Devlin et al. 2018).

    Sentences are gathered to rows of two segments; half of the second ones come from other documents. The loss is the sum
    of both.
    """

    families: ClassVar[tuple[str, ...]] = ("PRETRAINING",)
    accuracy: ClassVar[str] = "masked_accuracy"
    headline: ClassVar[tuple[str, ...]] = ("loss", "masked_accuracy", "nsp_accuracy", "bits_per_byte")

    directions: ClassVar[Mapping[str, str | None]] = {
        "loss": "min", "bits_per_byte": "min", "perplexity": "min", "masked_loss": "min", "nsp_loss": "min",
    }  # fmt: skip

    @property
    def sentences(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_share(self.share, f"{self.name}()")

    def refuse(self, tokenizer: Any, backbone: Backbone) -> None:
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES as KNOWN,
        )

        vocabulary_of(tokenizer, f"{self.name}()")
        if getattr(getattr(backbone.model, "config", None), "model_type", None) not in KNOWN:
            raise UserError(
                f"{backbone.source} ({type(backbone.model).__name__}) has no head for the order of sentences; use mlm()."
            )
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise UserError(f"{self.name}() needs a tokenizer with a [CLS] and a [SEP] token.")

    def rows(
        self, examples: Documents, texts: Texts, backbone: Backbone, max_length: int, training: bool
    ) -> TokenRows:
        if max_length < SPECIAL + 2:
            raise UserError(
                f"data.max_length is {max_length}, but a pair of segments needs at least {SPECIAL + 2} tokens."
            )
        return PairRows(examples, texts, backbone.processor, max_length, self, training)

    def terms(self, outputs: Any, batch: Batch) -> Terms:
        rows = len(batch.rows)
        scores, order = outputs[: -2 * rows].view(-1, 2), outputs[-2 * rows :].view(rows, 2)
        wanted = batch.inputs[ORDER]
        losses = nn.functional.cross_entropy(order, wanted, reduction="none")
        return {
            TOKENS: token_term(scores, batch),
            NSP: Term(losses, (order.detach().argmax(-1) == wanted).float()),
        }

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        assert isinstance(dataset, PairRows)
        found = super().metrics(outcomes, dataset, labels, intervals)
        loss, correct = self.means(outcomes, dataset, 1)
        return {
            **found, "loss": found["loss"] + loss, "masked_loss": found["loss"], "nsp_loss": loss, "nsp_accuracy": correct,
        }  # fmt: skip

    def statistics(self, dataset: Any, labels: Any) -> dict[str, Any]:
        sizes = dataset.sizes_of(np.arange(len(dataset)), Pass())
        return super().statistics(dataset, labels) | {
            "padded_share": 1 - float(sizes.mean()) / dataset.length,
            "random_share": float(dataset.pairs(0, 0).random.mean()),
        }  # fmt: skip
