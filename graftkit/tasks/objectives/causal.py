"""Causal language modelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.attention import keep_parts_apart
from graftkit.backbone.packed import Parts, packed
from graftkit.data.packing import leaks, pack, positions
from graftkit.data.source import Batch, Pass
from graftkit.errors import UserError
from graftkit.recipe.catalogue import option
from graftkit.tasks.objectives.base import PLACES, ROWS, TARGETS, Objective, TokenRows
from graftkit.tasks.objectives.documents import Documents, Texts


@dataclass(frozen=True)
class Pieces:
    """Documents cut into pieces of at most `length` targets and packed into rows, best fit first.

    A document with n tokens has n + 1 targets: its tokens and its end. `documents`, `starts`, `sizes` (pieces,): the
    document of each piece, the number of its first target in it, and how many it has. `begins` (rows + 1,): the first piece
    of each row. `cut`: how many documents have several pieces.
    """

    documents: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    begins: np.ndarray
    cut: int

    @property
    def targets(self) -> np.ndarray:
        """The number of targets of each row, (rows,)."""
        return np.add.reduceat(self.sizes, self.begins[:-1])


def packed_pieces(lengths: np.ndarray, length: int) -> Pieces:
    """Cut documents of these numbers of tokens, and pack the pieces by best-fit decreasing ("Fewer Truncations Improve
    Language Modeling", Ding et al. 2024): no token is left out, and only documents longer than a row are cut."""
    targets = lengths + 1
    counts = -(-targets // length)
    documents = np.repeat(np.arange(len(lengths)), counts)
    starts = positions(counts) * length
    sizes = np.minimum(length, targets[documents] - starts)
    groups = pack(sizes.tolist(), length)
    order = np.concatenate(groups).astype(np.int64)
    begins = np.concatenate([[0], np.cumsum([len(group) for group in groups])])
    return Pieces(documents[order], starts[order], sizes[order], begins, int((counts > 1).sum()))


class CausalRows(TokenRows):
    """Rows of one length in which each token predicts the next. Pieces of documents stand one behind the other; each
    document begins with the token `first`, which predicts its first token, and its last token predicts `last`."""

    def __init__(
        self, examples: Documents, texts: Texts, tokenizer: Any, max_length: int, apart: bool
    ) -> None:
        length = int(min(max_length, texts.lengths.sum() + len(texts)))
        self.pieces = packed_pieces(texts.lengths, length)
        self.sizes = self.pieces.targets
        super().__init__(examples, texts, len(self.sizes), length, int(self.sizes.sum()))
        self.first, self.last = ends_of(tokenizer)
        self.padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.last
        self.tokenizer, self.apart = tokenizer, apart

    def units_of(self, rows: np.ndarray, at: Pass) -> float:
        return float(self.sizes[rows].sum())

    def tokens(self, rows: np.ndarray) -> int:
        return int(self.sizes[rows].sum())

    def piece(self, number: int) -> np.ndarray:
        """Return the tokens of a piece, one more than it has targets: each predicts the one behind it."""
        document, start = int(self.pieces.documents[number]), int(self.pieces.starts[number])
        end = start + int(self.pieces.sizes[number])
        tokens = self.texts.tokens(document, max(0, start - 1), min(end, int(self.texts.lengths[document])))
        first = [[self.first]] if start == 0 else []
        last = [[self.last]] if end > self.texts.lengths[document] else []
        return np.concatenate([*first, tokens, *last]).astype(np.int64)

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        """Return ids, padded at the end, and position ids that restart with each document unless they attend to each
        other; models of transformers mask attention where positions restart."""
        ids = np.full((len(rows), self.length), self.padding, dtype=np.int64)
        numbers = np.zeros_like(ids)
        targets = []
        for i, row in enumerate(rows):
            pieces = [self.piece(p) for p in range(self.pieces.begins[row], self.pieces.begins[row + 1])]
            size = int(self.sizes[row])
            ids[i, :size] = np.concatenate([piece[:-1] for piece in pieces])
            numbers[i] = positions([*(len(piece) - 1 for piece in pieces), self.length - size])
            targets += [piece[1:] for piece in pieces]
        counts = self.sizes[rows]
        made = {
            "input_ids": torch.from_numpy(ids),
            TARGETS: torch.from_numpy(np.concatenate(targets)),
            ROWS: torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
            PLACES: torch.from_numpy(positions(counts)),
        }
        return made | ({"position_ids": torch.from_numpy(numbers)} if self.apart else {})

    def call(self, model: nn.Module, batch: Batch) -> Any:
        with packed(self.parts(batch.rows) if self.apart else None):
            return super().call(model, batch)

    def parts(self, rows: np.ndarray) -> Parts:
        """Return the parts of these rows: pieces, and the padding."""
        begins = self.pieces.begins
        sizes = [
            [*self.pieces.sizes[begins[row] : begins[row + 1]].tolist(), self.length - int(self.sizes[row])]
            for row in rows
        ]
        return Parts([[size for size in row if size] for row in sizes])

    def where(self, row: int) -> str:
        parts = self.pieces.documents[self.pieces.begins[row] : self.pieces.begins[row + 1]]
        return "; ".join(self.examples.where(int(self.texts.numbers[part])) for part in parts[:8])

    def shown(self) -> str:
        return self.tokenizer.decode(self.piece(0).tolist())


def ends_of(tokenizer: Any) -> tuple[int, int]:
    """Return the tokens that begin and end a document: those of the tokenizer, or its end token for both."""
    last = tokenizer.eos_token_id
    return last if tokenizer.bos_token_id is None else tokenizer.bos_token_id, last


@dataclass(frozen=True)
class Causal(Objective):
    """Predict the next token, as GPT does (Radford et al. 2018).

    Documents are packed into rows of one length, so that few are cut and none of their tokens is left out.
    """

    families: ClassVar[tuple[str, ...]] = ("CAUSAL_LM",)
    geometry: ClassVar[str] = "gpt"
    vocabulary: ClassVar[str] = "bpe"
    scored: ClassVar[float] = 1.0
    headline: ClassVar[tuple[str, ...]] = ("loss", "token_accuracy", "bits_per_byte")

    apart: bool = option(
        True, "documents in one row do not attend to each other; false: they do, which is a little faster"
    )

    def refuse(self, tokenizer: Any, backbone: Backbone) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{self.name}() needs a tokenizer with an end token (eos_token), and that of {backbone.source} has none."
            )
        if not backbone.is_decoder:
            raise UserError(
                f"{backbone.source} ({type(backbone.model).__name__}) reads in both directions, so {self.name}() would show "
                "it the token that it predicts. Use a decoder such as GPT-2 or Llama, or the objective mlm()."
            )

    def rows(
        self, examples: Documents, texts: Texts, backbone: Backbone, max_length: int, training: bool
    ) -> TokenRows:
        rows = CausalRows(examples, texts, backbone.processor, max_length, self.apart)
        if training and self.apart and not next(backbone.model.parameters()).is_meta:
            keep_parts_apart(backbone)
            reason = leaks(
                backbone.model, [rows.piece(i)[:-1] for i in range(min(3, len(rows.pieces.sizes)))]
            )
            if reason is not None:
                raise UserError(
                    f"{self.name}(apart=True): documents in one row of {backbone.source} cannot be kept apart: {reason}. Use "
                    "apart=false."
                )
        return rows

    def statistics(self, dataset: Any, labels: Any) -> dict[str, Any]:
        positions = len(dataset) * dataset.length
        return super().statistics(dataset, labels) | {
            "padded_share": 1 - int(dataset.sizes.sum()) / positions, "cropped_share": 0.0,
            "documents_cut": dataset.pieces.cut,
        }  # fmt: skip
