"""Base of the objectives: tasks that need no labels, because their targets are made from the documents of a corpus.

An objective is one file in this folder with a class derived from `Objective`. Its data flows like this:

    read        a corpus: paths are checked, nothing is read yet (`graftkit.data.corpora`)
    split       which documents are held out: a function of (seed, number of the document)
    dataset     the corpus is tokenized once, into memory-mapped shards in the cache folder, and `rows` makes a `TokenRows`
                of them: a source with random access by row number
    learner     `terms` of what `TokenRows.call` returns; by default one term, over the target tokens
    metrics     loss, accuracy, perplexity and bits per byte, from the sums of these terms over all rows

An objective implements `refuse` (what is wrong with a tokenizer or model) and `rows`. Its `TokenRows` implements `inputs`:

- `inputs(rows, at)` returns the model's inputs, and with them three flat tensors of equal length (targets,), int64:
  `TARGETS`, the ids of the target tokens; `ROWS`, the place in the batch of the row of each; `PLACES`, the position whose
  logits predict it. They come one row after another. They are moved to the device with the inputs, and `call` takes them
  out again (`model_inputs`). Random draws come from `at.generator(row)`, so they are functions of (seed, epoch, row) alone;
  what follows a schedule is a function of `at.progress`.
- `units_of(rows, at)` returns the number of targets in these rows, without making them; `count` calls it.
- `call` computes `token_scores` at these places, (targets, 2); override it if a model is called in another way.
- Evaluation rows get the pass `Pass()` each time, so their masks never change. `dataset(..., training=False)` made them:
  settings of the training, such as a schedule, do not apply there, so that losses of different settings compare.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.claims import InUse
from graftkit.data.columns import Column
from graftkit.data.corpora import Corpus, Shards, open_corpus, tokenized
from graftkit.data.order import Order, Permuted
from graftkit.data.read import Table
from graftkit.data.source import Batch, Pass
from graftkit.errors import UserError
from graftkit.recipe.catalogue import option
from graftkit.recipe.environment import cache_folder
from graftkit.tasks.base import Calls, Dataset, Examples, Learn, Reading, Task, Term, Terms
from graftkit.tasks.objectives.documents import CorpusTable, Documents, Texts
from graftkit.tasks.shared.scores import BEST, LABEL, token_scores
from graftkit.tasks.shared.texts import tokenizer_of

TOKENS = "tokens"  # the term over target tokens
TARGETS, ROWS, PLACES = "targets", "target_rows", "target_places"  # of the inputs of a batch; see above
POLL = 0.5  # seconds between two looks at a corpus that another run tokenizes
SHARDS = "shards"  # folder of tokenized corpora in the cache


class TokenRows(Dataset):
    """Rows of one length, made of the tokens of documents when they are needed. No memory is taken per row.

    `texts`: the documents; `rows`: how many rows there are; `length`: positions of each; `predicted`: tokens of the
    documents that a model is asked for in one pass over them, were it asked for all: the text's own, and an end of each
    document if the objective predicts that too.
    """

    keeps = False  # masks differ between epochs
    uniform = True
    hidden: ClassVar[tuple[str, ...]] = (TARGETS, ROWS, PLACES)  # inputs that the model does not get

    def __init__(self, examples: Examples, texts: Texts, rows: int, length: int, predicted: int) -> None:
        super().__init__(examples, np.broadcast_to(np.int64(length), (rows,)))
        self.texts = texts
        self.length = length
        self.predicted = predicted

    def order(self, batch_size: int, seed: int, epoch: int) -> Order:
        return Permuted(len(self), batch_size, seed, epoch)

    def units_of(self, rows: np.ndarray, at: Pass) -> float:
        """Return the number of target tokens of these rows."""
        raise NotImplementedError

    def count(self, rows: np.ndarray, at: Pass) -> Mapping[str, float]:
        return {TOKENS: float(self.units_of(rows, at))}

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the inputs of a batch without what belongs to the targets."""
        return {name: t for name, t in batch.inputs.items() if name not in self.hidden}

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """Return `token_scores` of the target tokens, (targets, 2)."""
        given = batch.inputs
        return token_scores(model, self.model_inputs(batch), given[ROWS], given[PLACES], given[TARGETS])

    def bits_per_byte(self, loss: float) -> float:
        """Return bits per byte of text for a mean loss per target in nats: loss / ln 2 * tokens to predict / bytes.

        Exact if every token is a target once, as in causal language modelling. Otherwise an estimate, as if the tokens that
        were no targets had the same mean loss, each with the others around it given; still comparable over tokenizers.
        """
        return loss / math.log(2) * self.predicted / max(1, self.texts.bytes)

    def digested(self) -> Sequence[bytes | np.ndarray]:
        return [self.texts.shards.digest().encode(), self.texts.numbers, np.array([len(self), self.length])]

    def shown(self) -> str:
        """Return the first row as the model reads it."""
        return ""


@dataclass(frozen=True)
class Objective(Task):
    """Base of all objectives. Options declared here belong to each of them."""

    columns: ClassVar[tuple[Column, ...]] = (Column("text", ("content", "document", "body"), "text"),)
    labelled: ClassVar[tuple[str, ...]] = ()
    method: ClassVar[str] = "full()"
    head: ClassVar[bool] = False  # the model has the head of its pre-training
    makes_model: ClassVar[bool] = True
    new_head: ClassVar[bool] = True
    geometry: ClassVar[str] = "bert"  # the family of a new model whose size is named without one
    vocabulary: ClassVar[str] = "wordpiece"  # the kind of tokenizer that is trained for a new model
    special_tokens: ClassVar[tuple[str, ...]] = ()  # tokens that it needs besides BERT's
    scored: ClassVar[float] = (
        0.15  # about the share of the tokens of a row that are targets, to estimate the speed
    )
    accuracy: ClassVar[str] = "token_accuracy"  # the name of the accuracy over target tokens
    headline: ClassVar[tuple[str, ...]] = ("loss", "bits_per_byte")
    directions: ClassVar[Mapping[str, str | None]] = {
        "loss": "min", "bits_per_byte": "min", "perplexity": "min",
    }  # fmt: skip

    documents: str = option(
        "auto",
        "what a document is in a text file: each paragraph, line or file; auto: decided once for the corpus",
        choices=("auto", "paragraphs", "lines", "file"),
    )
    duplicates: bool = option(True, "keep documents whose normalised text occurred before")

    @property
    def sentences(self) -> bool:
        """Whether documents are split into sentences."""
        return False

    # ---- the corpus

    def read(self, source: Any, reading: Reading, name: str) -> Table:
        given = source if isinstance(source, list | tuple) else [source]
        if not given or not all(isinstance(path, str | Path) for path in given):
            raise UserError(
                f"{self.name}() reads a corpus from files: name a text, JSON lines or Parquet file, or a folder of these."
            )
        paths, column = tuple(map(str, given)), reading.columns.get("text")
        corpus = open_corpus(
            list(paths), column=column, documents=self.documents, encoding=reading.encoding, name=name
        )
        return CorpusTable(
            {column or "text": []},
            ", ".join(paths),
            [],
            "document",
            (),
            corpus,
            paths,
            column,
            self.documents,
        )

    def examples(
        self, table: Table, columns: dict[str, str], labels: Sequence[str], skip_bad: bool, targets: bool = True,
    ) -> Examples:  # fmt: skip
        return Documents(table, {})

    def split(self, examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
        assert isinstance(examples, Documents)
        return examples.split(share, seed)

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        raise UserError(
            f"{self.name}() has no answers to predict. `graftkit evaluate RUN --data FILE` computes its metrics on other "
            "texts, and RUN/model is a plain model for `graftkit tune --model RUN/model` or transformers."
        )

    # ---- rows of tokens

    def refuse(self, tokenizer: Any, backbone: Backbone) -> None:
        """Raise `UserError` for a tokenizer or a model that the objective cannot use, before the corpus is read."""

    def rows(
        self, examples: Documents, texts: Texts, backbone: Backbone, max_length: int, training: bool
    ) -> TokenRows:
        """Make the rows of these documents. Raises `UserError` if there are none."""
        raise NotImplementedError

    def rehearse(self, examples: Examples, backbone: Backbone, max_length: int) -> None:
        self.refuse(tokenizer_of(backbone, self), backbone)

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        assert isinstance(examples, Documents)
        tokenizer = tokenizer_of(backbone, self)
        self.refuse(tokenizer, backbone)
        shards = self.shards(examples, tokenizer)
        texts = Texts(shards, examples.numbers(len(shards.documents) - 1))
        if not texts.lengths.sum():
            raise UserError(
                f"{examples.table.source} has no text{' that is held out' * examples.held}: it is empty."
            )
        return self.rows(replace(examples, count=len(texts)), texts, backbone, max_length, training)

    def shards(self, examples: Documents, tokenizer: Any) -> Shards:
        """Tokenize the corpus, unless an earlier run did. If another run is at it, wait for that."""
        folder = self.shards_of(examples, tokenizer)
        while True:
            try:
                return tokenized(
                    examples.corpus,
                    tokenizer,
                    folder,
                    sentences=self.sentences,
                    keep_duplicates=self.duplicates,
                )
            except InUse:
                time.sleep(POLL)

    def shards_of(self, examples: Documents, tokenizer: Any) -> Path:
        """Return the folder of the tokenized corpus in the cache, named by all that decides its content."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        what = _stamps(examples.corpus), examples.corpus.reading, self.duplicates, self.sentences, vocabulary
        return cache_folder() / SHARDS / hashlib.sha256(repr(what).encode()).hexdigest()[:24]

    def rendered(self, dataset: Dataset) -> str:
        assert isinstance(dataset, TokenRows)
        return dataset.shown()

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        assert isinstance(dataset, TokenRows)
        found = super().statistics(dataset, labels)
        return {
            **found, "rows": len(dataset), "documents": len(dataset.texts), "bytes": dataset.texts.bytes,
            "text_tokens": int(dataset.texts.lengths.sum()), **dataset.texts.statistics(),
        }  # fmt: skip

    # ---- loss and metrics

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        if label_smoothing:
            raise UserError(
                f"train.label_smoothing is {label_smoothing}, which {self.name}() does not use; leave it out."
            )

        def learn(forward: Calls, batch: Batch) -> Terms:
            return self.terms(forward(batch), batch)

        return learn

    def terms(self, outputs: Any, batch: Batch) -> Terms:
        """Return the terms of the loss from what `TokenRows.call` returned."""
        return {TOKENS: token_term(outputs, batch)}

    def outcomes(self, forward: Calls, batch: Batch) -> Sequence[Any]:
        """Return for each row (2 * terms,): the summed loss and the number of correct units of each term."""
        terms = self.terms(forward(batch), batch)
        parts = [part for term in terms.values() for part in (term.each(), each_correct(term))]
        return list(torch.stack([part.double() for part in parts], dim=1).cpu().numpy())

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        assert isinstance(dataset, TokenRows)
        loss, correct = self.means(outcomes, dataset, 0)
        return {
            "loss": loss, self.accuracy: correct, "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": dataset.bits_per_byte(loss), "targets": int(self.units(dataset)[0]), "rows": len(outcomes),
        }  # fmt: skip

    def units(self, dataset: TokenRows) -> list[float]:
        """Return the number of units of each term in the evaluation of all rows."""
        return list(dataset.count(np.arange(len(dataset)), Pass()).values())

    def means(self, outcomes: Sequence[Any], dataset: TokenRows, term: int) -> tuple[float, float]:
        """Return the mean loss and the accuracy of a term over all rows."""
        sums = np.sum(outcomes, axis=0)[2 * term : 2 * term + 2] / max(1.0, self.units(dataset)[term])
        return float(sums[0]), float(sums[1])


def _stamps(corpus: Corpus) -> list[tuple[str, int, int]]:
    """Return place, size and time of change of each file."""
    return [(os.path.abspath(file.path), file.size, os.stat(file.path).st_mtime_ns) for file in corpus.files]


def token_term(scores: Tensor, batch: Batch, weight: float = 1.0) -> Term:
    """Return the term over target tokens for their scores (targets, 2)."""
    losses = -scores[:, LABEL]
    correct = (scores[:, LABEL] >= scores[:, BEST]).detach().float()
    return BySum(
        losses.sum(), correct.sum(), weight, lambda: by_row(losses, batch), lambda: by_row(correct, batch)
    )


@dataclass(frozen=True)
class BySum(Term):
    """A term whose parts are summed; `each_correct` counts the correct units of each row on demand."""

    each_correct: Any = None


def each_correct(term: Term) -> Tensor:
    """Return the number of correct units of each row, (rows,)."""
    found = term.each_correct() if isinstance(term, BySum) else term.correct
    return torch.zeros_like(term.each()) if found is None else found


def by_row(values: Tensor, batch: Batch) -> Tensor:
    """Return the sums (rows,) of values (targets,) of the targets of a batch."""
    return values.new_zeros(len(batch.rows)).index_add(0, batch.inputs[ROWS], values)
