"""Span corruption."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.backbone.fit import check_token_ids
from graftkit.data.source import Pass
from graftkit.errors import UserError
from graftkit.recipe.catalogue import option
from graftkit.tasks.objectives.base import PLACES, ROWS, TARGETS, Objective, TokenRows
from graftkit.tasks.objectives.documents import Documents, Joined, Texts

SHARE, MEAN_SPAN = 0.15, 3.0  # of every evaluation; those of T5
SENTINEL = "<extra_id_{}>"
SENTINELS = 100


def noise_counts(length: int, share: float, mean_span: float) -> tuple[int, int]:
    """Return how many of `length` tokens, at least 2, are left out, and in how many spans.

    As T5's `random_spans_noise_mask`; if more than half of the tokens are left out, there are no more spans than tokens
    between them.
    """
    noise = min(max(round(length * share), 1), length - 1)
    return noise, max(1, min(round(noise / mean_span), noise, length - noise))


def noise_mask(random: np.random.Generator, length: int, share: float, mean_span: float) -> np.ndarray:
    """Return which of `length` tokens are left out, (length,) bool.

    T5's `random_spans_noise_mask`: kept and left out stretches alternate, kept ones first, and all masks with the two
    counts of `noise_counts` are equally likely.
    """
    noise, spans = noise_counts(length, share, mean_span)
    kept, left_out = (_segments(random, total, spans) for total in (length - noise, noise))
    return np.repeat(np.tile([False, True], spans), np.stack([kept, left_out], axis=1).reshape(-1))


def _segments(random: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Return `count` random lengths, each at least 1, with this sum; all such lists are equally likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1 if count > 1 else np.zeros(0)
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


def corrupted(
    ids: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs, in which each span that is left out is one sentinel, and the targets, in which each such span
    follows its sentinel. Both close with the token `end`."""
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    marks = sentinels[np.cumsum(starts) - 1]  # of the span that begins there, or the last one before
    inputs = np.where(starts, marks, ids)[~mask | starts]
    targets = np.insert(ids[mask], np.flatnonzero(starts[mask]), marks[starts])
    return np.append(inputs, end), np.append(targets, end)


class SpanRows(TokenRows):
    """Equally many tokens of the documents in sequence, without separators. All rows have as many spans, so all inputs of
    the encoder have one length, at most `max_length`, and all targets another. Tokens behind the last full row are left
    out (`dropped`)."""

    def __init__(
        self, examples: Documents, texts: Texts, tokenizer: Any, max_length: int, start: int,
        share: float = SHARE, mean_span: float = MEAN_SPAN,
    ) -> None:  # fmt: skip
        self.joined = Joined(texts)
        self.kind = share, mean_span
        self.body = 2
        while self.body < self.joined.total and self._sizes(self.body + 1)[0] <= max_length:
            self.body += 1
        self.noise, self.spans = noise_counts(self.body, *self.kind)
        inputs, self.written = self._sizes(self.body)
        rows = self.joined.total // self.body
        # a token that is left out costs its share of the sentinels and ends too, so these are counted as predicted
        predicted = round(int(texts.lengths.sum()) * self.written / self.noise)
        super().__init__(examples, texts, rows, inputs + self.written, predicted)
        self.dropped = self.joined.total - rows * self.body
        self.tokenizer, self.start = tokenizer, start
        self.sentinels, self.end = sentinels_of(tokenizer), tokenizer.eos_token_id

    def _sizes(self, body: int) -> tuple[int, int]:
        """Return the lengths of inputs and targets of a row with `body` tokens."""
        noise, spans = noise_counts(body, *self.kind)
        return body - noise + spans + 1, noise + spans + 1

    def units_of(self, rows: np.ndarray, at: Pass) -> float:
        return float(self.written * len(rows))

    def row(self, row: int, at: Pass) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of a row: a function of (seed, epoch, row)."""
        ids = self.joined.tokens(row * self.body, (row + 1) * self.body)
        mask = noise_mask(at.generator(row), self.body, *self.kind)
        return corrupted(ids, mask, self.sentinels, self.end)

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        made = [self.row(int(row), at) for row in rows]
        targets = np.stack([targets for _, targets in made])
        before = np.roll(targets, 1, axis=1)  # what the decoder has read when it writes a target
        before[:, 0] = self.start
        return {
            "input_ids": torch.from_numpy(np.stack([ids for ids, _ in made])),
            "decoder_input_ids": torch.from_numpy(before),
            TARGETS: torch.from_numpy(targets.reshape(-1)),
            ROWS: torch.arange(len(rows)).repeat_interleave(self.written),
            PLACES: torch.arange(self.written).repeat(len(rows)),
        }

    def where(self, row: int) -> str:
        return self.examples.where(int(self.texts.numbers[self.joined.document(row * self.body)]))

    def shown(self) -> str:
        """Return inputs and targets of the first row."""
        return "\n\n".join(self.tokenizer.decode(part.tolist()) for part in self.row(0, Pass()))


def sentinels_of(tokenizer: Any) -> np.ndarray:
    """Return the ids of the sentinels of a tokenizer, (sentinels,): `<extra_id_0>` and so on, up to the first it lacks."""
    known = tokenizer.get_vocab()
    names = itertools.takewhile(known.__contains__, map(SENTINEL.format, itertools.count()))
    return np.array([known[name] for name in names], dtype=np.int64)


@dataclass(frozen=True)
class SpanCorruption(Objective):
    """Write the spans that are missing from a text (T5, Raffel et al. 2020, section 3.1.4).

    The encoder reads a text in which each span is a sentinel, `<extra_id_0>`, `<extra_id_1>` and so on; the decoder writes
    each sentinel and its span. 15% of the tokens are left out, in spans of 3 in the mean, drawn anew in each epoch;
    evaluation always leaves out the same ones.
    """

    aliases: ClassVar[tuple[str, ...]] = ("t5",)
    families: ClassVar[tuple[str, ...]] = ("SEQ_TO_SEQ_CAUSAL_LM",)
    geometry: ClassVar[str] = "t5"
    vocabulary: ClassVar[str] = "unigram"
    special_tokens: ClassVar[tuple[str, ...]] = ("</s>", *map(SENTINEL.format, range(SENTINELS)))
    scored: ClassVar[float] = 0.23  # 15% of the text, a sentinel for each 3 tokens, and an end
    headline: ClassVar[tuple[str, ...]] = ("loss", "token_accuracy", "bits_per_byte")

    share: float = option(0.15, "share of the tokens that are left out", above=0, below=1)
    mean_span: float = option(3.0, "mean length of a span in tokens", at_least=1)

    def refuse(self, tokenizer: Any, backbone: Backbone) -> None:
        config: Any = getattr(backbone.model, "config", None)
        if not getattr(config, "is_encoder_decoder", False) or config.decoder_start_token_id is None:
            raise UserError(
                f"{self.name}() pre-trains an encoder with a decoder, but {backbone.source} is a "
                f"{type(backbone.model).__name__}. Begin with a new model, such as size=t5-mini, or with a T5."
            )
        if tokenizer.eos_token_id is None or not len(sentinels_of(tokenizer)):
            raise UserError(
                f"{self.name}() needs a tokenizer with an end token and the sentinels {SENTINEL.format(0)}, "
                f"{SENTINEL.format(1)} ..., and that of {backbone.source} has none. Begin with a new model, such as "
                "size=t5-mini, or with a T5."
            )
        check_token_ids(backbone, [sentinels_of(tokenizer)], lambda row: "the tokenizer's sentinels")

    def rows(
        self, examples: Documents, texts: Texts, backbone: Backbone, max_length: int, training: bool
    ) -> TokenRows:
        kind = (self.share, self.mean_span) if training else ()
        start: Any = backbone.model.config.decoder_start_token_id  # type: ignore[union-attr]
        made = SpanRows(examples, texts, backbone.processor, max_length, start, *kind)
        if made.length - made.written > max_length:
            raise UserError(
                f"data.max_length is {max_length}, but {self.name}() needs at least {made.length - made.written} tokens: one of "
                "the text, a sentinel and an end."
            )
        if not len(made):
            raise UserError(f"{examples.table.source} has a single token; {self.name}() needs two at least.")
        if made.spans > len(made.sentinels):
            raise UserError(
                f"a row has {made.spans} spans, but the tokenizer of {backbone.source} has {len(made.sentinels)} sentinels; lower "
                "data.max_length, or raise mean_span."
            )
        return made
