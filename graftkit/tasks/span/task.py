"""Extractive question answering: the answer to a question is a span of a text."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.backbone.fit import check_token_ids, check_token_types
from graftkit.data.columns import Column
from graftkit.data.read import Table
from graftkit.data.source import Batch
from graftkit.data.squad import Gold, locate, nested, read_answers, squad_table
from graftkit.data.stream import slices, stream_table
from graftkit.errors import UserError, listing, shown
from graftkit.recipe.catalogue import option
from graftkit.tasks.base import Calls, Dataset, Examples, Learn, Reading, Task, check_rows, one_term
from graftkit.tasks.explained import Aim, Cut
from graftkit.tasks.shared.by_row import means
from graftkit.tasks.shared.labels import is_missing
from graftkit.tasks.shared.texts import made_up_texts, text_problem, tokenizer_of
from graftkit.tasks.span.aims import aim_at_span, cut_window, odds_of_spans
from graftkit.tasks.span.metrics import best_threshold, figures, score
from graftkit.tasks.span.windows import Best, Found, Windows, cut_windows, gather, search, span_loss

NO_ANSWER = "no answer"
STARTS = ("answer_start", "answer_starts", "start")
HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Span(Task):
    """Extractive question answering: the answer to a question as a span of a text, or no answer."""

    aliases: ClassVar[tuple[str, ...]] = ("question_answering", "extractive_qa", "qa", "squad")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("question", ("query",), "text"),
        Column("context", ("passage", "paragraph", "document", "text"), "text"),
        Column("answers", ("answer",), "answers", required=False),
    )
    labelled: ClassVar[tuple[str, ...]] = ("answers",)
    per_token: ClassVar[bool] = True
    explains: ClassVar[bool] = True
    headline: ClassVar[tuple[str, ...]] = ("f1", "exact_match")
    families: ClassVar[tuple[str, ...]] = ("QUESTION_ANSWERING",)
    using: ClassVar[tuple[str, ...]] = ("doc_stride", "max_answer_length", "n_best", "threshold")

    doc_stride: int = option(
        128,
        "overlap of the windows of a long text in tokens, at most half a window",
        at_least=0,
    )
    max_answer_length: int = option(30, "maximum number of tokens of an answer", at_least=1)
    n_best: int = option(20, "number of best spans kept of each window", at_least=1)
    threshold: float | None = option(
        None,
        "predict no answer if its score exceeds the best span's by more; null: chosen on the evaluation rows",
    )

    def read(self, source: Any, reading: Reading, name: str) -> Table:
        whole = nested(source, reading.encoding)
        if whole is None:
            return super().read(source, reading, name)
        called = str(source) if isinstance(source, str | Path) else f"{name} (in memory)"
        return squad_table(whole, called, reading.skip_bad)

    def pieces(self, source: Any, reading: Reading, name: str, rows: int) -> Iterator[Table]:
        if nested(source, reading.encoding) is not None:
            return slices(self.read(source, reading, name), rows)
        return stream_table(
            source, encoding=reading.encoding, skip_bad=reading.skip_bad, name=name, rows=rows
        )

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        """Return ('answer', 'no answer') if some questions have no answer, else nothing."""
        golds = (_golds(table, columns, row) for row in range(len(table)) if "answers" in columns)
        return ("answer", NO_ANSWER) if any(gold is not None and not gold.answers for gold in golds) else ()

    def outputs(self, labels: Sequence[str]) -> int:
        return 2

    def output_names(self, labels: Sequence[str]) -> Sequence[str]:
        return "start", "end"

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        if targets and "answers" not in columns:
            raise UserError(
                f"{table.source} has no column 'answers' (columns: {listing(table.columns)}). Name it with "
                "data.columns={answers: ...}."
            )
        seen: dict[Any, int] = {}

        def problem(row: int) -> str | None:
            where = table.where(row)
            for name in ("question", "context"):
                found = text_problem(table, columns[name], row)
                if found is not None:
                    return found
                if HALF_PAIR.search(str(table.columns[columns[name]][row])):
                    return f"{where}: column {columns[name]!r} has half of a surrogate pair, which is no character."
            if "id" in table.columns and not is_missing(identity := table.columns["id"][row]):
                if not isinstance(identity, str | int | float):
                    return f"{where}: id is {shown(identity, 40)}, but must be a text or a number."
                first = seen.setdefault(identity, row)
                if first != row:
                    return f"{where}: id {identity!r} is that of {table.where(first)} too; each question needs its own."
            try:
                if targets:
                    read_gold(table, columns, row)
            except ValueError as error:
                return f"{where}: column {columns['answers']!r}: {error}."
            return None

        kept, skipped = check_rows(table, problem, skip_bad)
        values: dict[str, list[Any]] = {"id": kept.columns["id"]} if "id" in kept.columns else {}
        values |= {name: [str(v) for v in kept.columns[columns[name]]] for name in ("question", "context")}
        golds = [read_gold(kept, columns, row) for row in range(len(kept))] if targets else None
        return Examples(kept, values, golds, skipped)

    def hold_out(self, examples: Examples, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Hold out whole articles, or contexts if there is at most one article, so that no text is on both sides."""
        table, rows = examples.table, range(len(examples))
        titles = table.columns.get("title", [None] * len(examples))
        groups = examples.values["context"] if len(set(titles)) < 2 else [str(title) for title in titles]
        if len(set(groups)) < 2:
            raise UserError(
                f"all questions of {table.source} are on one text, so none can be held out for evaluation. Set data.eval "
                "to a file, or to null for none"
            )
        names = sorted(set(groups))
        random.Random(int(seed)).shuffle(names)
        sizes = Counter(groups)
        held: set[str] = set()
        wanted, total = share * len(examples), 0
        for name in names[:-1]:
            if total + sizes[name] / 2 <= wanted or not held:
                held.add(name)
                total += sizes[name]
        return [i for i in rows if groups[i] not in held], [i for i in rows if groups[i] in held]

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        """Return rows of a list of pairs (question, context), or of one such pair."""
        if items and all(isinstance(item, str) for item in items):
            if len(items) != 2:
                raise UserError(
                    f"a question is answered from a text: give both, QUESTION and CONTEXT ({len(items)} "
                    f"{'text is' if len(items) == 1 else 'texts are'} given), or --data FILE; in Python a list of pairs."
                )
            items = [tuple(items)]
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in items):
            return None
        if not items:
            raise UserError("there is no question to answer; give QUESTION and CONTEXT, or --data FILE.")
        for number, pair in enumerate(items, start=1):
            for name, text in zip(("question", "context"), pair):
                if not isinstance(text, str) or not text.strip():
                    raise UserError(f"the {name} of pair {number} of {len(items)} is empty or no text.")
        return [{columns["question"]: question, columns["context"]: context} for question, context in items]

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        return '"a question" "a context"'

    def made_up(self, columns: Mapping[str, str], labels: Sequence[str]) -> list[Any]:
        return [(text, text) for text in made_up_texts(labels)]

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        tokenizer = tokenizer_of(backbone, self)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer of {backbone.source} does not say where its tokens stand in the text, which span() "
                "needs; use a model with a fast tokenizer (tokenizer.json)."
            )
        # models that pad on the left have the text first, unless they read from left to right only
        question_first = tokenizer.padding_side == "right" or backbone.is_decoder
        windows = cut_windows(tokenizer, examples, max_length, self.doc_stride, question_first)
        features = [window.features for window in windows]
        check_token_ids(
            backbone, (row["input_ids"] for row in features), lambda i: examples.where(windows[i].question)
        )
        check_token_types(backbone, (row["token_type_ids"] for row in features if "token_type_ids" in row))
        data = Windows(examples, windows, tokenizer.pad_token_id or 0)
        if training and not data.units.any():
            raise UserError(
                f"no answer of {examples.table.source} is whole in a window of {max_length} tokens; raise data.max_length."
            )
        return data

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        return one_term(span_loss(label_smoothing))

    def outcomes(self, forward: Calls, batch: Batch) -> Sequence[Found]:
        logits = forward(batch)
        windows = batch.source
        assert isinstance(windows, Windows)
        losses = np.full(len(batch.rows), np.nan)
        if batch.targets is not None:
            known = (batch.targets[:, 0] >= 0).cpu().numpy()
            losses[known] = span_loss(0.0)(logits, batch).losses.detach().cpu().numpy()[known]
        scores = logits.float().cpu().numpy()
        return [
            replace(
                search(windows.windows[row], scores[i], self.max_answer_length, self.n_best), loss=losses[i]
            )
            for i, row in enumerate(batch.rows)
        ]

    def graded(self, outputs: Tensor) -> Tensor:
        return odds_of_spans(outputs)

    def aim(
        self, dataset: Dataset, outputs: Callable[[int], Tensor], labels: Sequence[str], label: str | None,
        word: str | None,
    ) -> Aim:  # fmt: skip
        assert isinstance(dataset, Windows)
        if label is not None:
            raise UserError(f"label={label!r}: the answers of this run are spans; leave the label out.")
        scores = (outputs(row)[0].cpu().numpy() for row in range(len(dataset)))
        limits = self.max_answer_length, self.n_best
        found = [search(window, one, *limits) for window, one in zip(dataset.windows, scores)]
        return aim_at_span(dataset, found, self.answers(found, dataset, labels)[0])

    def divide(self, dataset: Dataset, row: int, backbone: Backbone, inputs: dict[str, Tensor]) -> Cut:
        assert isinstance(dataset, Windows)
        return cut_window(dataset, row, tokenizer_of(backbone, self))

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        """Compute the metrics of evaluate-v2.0 if there are questions without an answer here or in training, else those of
        evaluate-v1.1; as fractions instead of percentages."""
        pairs, answerable, second, more = self._scored(outcomes, dataset, labels)
        losses = [outcome.loss for outcome in outcomes if not np.isnan(outcome.loss)]
        return {
            **figures(pairs[:, 0], pairs[:, 1], answerable, second, intervals), **more,
            "loss": float(np.mean(losses)) if losses else float("nan"), "rows": len(pairs),
        }  # fmt: skip

    def by_row(self, outcomes: Sequence[Any], dataset: Any, labels: Sequence[str]) -> dict[str, np.ndarray]:
        exact, f1s = self._scored(outcomes, dataset, labels)[0].T
        return means(f1=f1s, exact_match=exact)

    def _scored(
        self, outcomes: Sequence[Found], dataset: Dataset, labels: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, bool, dict[str, Any]]:
        """Return exact match and F1 of each question, (questions, 2); whether it has an answer; whether SQuAD 2.0 is
        followed; and the threshold if one applies."""
        golds = _golds_of(dataset)
        second = NO_ANSWER in labels or any(not gold for gold in golds)
        bests, texts = self._best(outcomes, dataset, labels)
        answerable = np.array([bool(gold) for gold in golds])
        pairs = np.array([score(text, gold, second) for text, gold in zip(texts, golds)])
        more: dict[str, Any] = {}
        if NO_ANSWER in labels:
            more["threshold"] = limit = self._limit(bests, texts, dataset)
            empty = np.array([best.lead > limit for best in bests])
            pairs[empty] = (~answerable[empty, None]).astype(float)
        return pairs, answerable, second, more

    def decided(self, metrics: dict[str, Any] | None) -> Span:
        if self.threshold is not None or (metrics is not None and "threshold" not in metrics):
            return self
        return replace(self, threshold=0.0 if metrics is None else metrics["threshold"])

    def _best(
        self, outcomes: Sequence[Found], dataset: Dataset, labels: Sequence[str]
    ) -> tuple[list[Best], list[str]]:
        """The best span of each question, and its text."""
        assert isinstance(dataset, Windows)
        contexts = dataset.examples.values["context"]
        bests = gather(outcomes, dataset.question_of, contexts, self.n_best, NO_ANSWER in labels)
        return bests, [context[best.start : best.end] for context, best in zip(contexts, bests)]

    def _limit(self, bests: Sequence[Best], texts: Sequence[str], dataset: Dataset) -> float:
        """The threshold: as it is set, else the best for these questions where their answers are known."""
        golds = _golds_of(dataset)
        if self.threshold is not None or not golds:
            return self.threshold or 0.0
        answered = [score(text, gold, True)[1] for text, gold in zip(texts, golds)]
        return best_threshold([best.lead for best in bests], answered, [bool(gold) for gold in golds])

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The best span of each question: its text, the characters of the context that it goes from and to (without
        the last), its probability and score. Where there is no answer: '', and no characters."""
        bests, texts = self._best(outcomes, dataset, labels)
        limit = self._limit(bests, texts, dataset) if NO_ANSWER in labels else np.inf
        rows = []
        for best, text in zip(bests, texts):
            none = best.lead > limit
            found: dict[str, Any] = {
                "answer": "" if none else text,
                "start": None if none else best.start,
                "end": None if none else best.end,
                "probability": round(best.null_probability if none else best.probability, 4),
                "score": round(best.score + best.lead if none else best.score, 4),
            }
            rows.append(found)
        return rows

    def line(self, answer: dict[str, Any]) -> str:
        text = " ".join(answer["answer"].split()) or f"({NO_ANSWER})"
        place = "-" if answer["start"] is None else f"{answer['start']}-{answer['end']}"
        return "\t".join([text, f"{answer['probability']:.3f}", place, answer["question"]])

    def worst(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """Answers that share no word with a right one, or should or should not be there; the largest loss first."""
        golds = _golds_of(dataset)
        second = NO_ANSWER in labels or any(not gold for gold in golds)
        bests, _ = self._best(outcomes, dataset, labels)
        golds_at: list[Gold] = list(dataset.examples.targets or ())
        given = self.answers(outcomes, dataset, labels)
        said = [found["answer"] for found in given]
        ranked = sorted(
            (score(text, gold, second)[1], -np.nan_to_num(best.loss), i)
            for i, (best, text, gold) in enumerate(zip(bests, said, golds))
        )
        return [
            {
                "where": dataset.examples.where(i),
                **self.asked(dataset.examples, i),
                "expected": " / ".join(dict.fromkeys(golds[i])) or NO_ANSWER,
                "answer": said[i] or NO_ANSWER,
                "marks": {
                    "of": "context",
                    "expected": [[at, at + len(text), ""] for text, at in golds_at[i].answers],
                    "answer": [[given[i]["start"], given[i]["end"], ""]] if said[i] else [],
                },
                "f1": round(f1, 4),
                "loss": round(-float(loss), 4),
            }
            for f1, loss, i in ranked[:count] if f1 < 1
        ]  # fmt: skip

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        found = super().statistics(dataset, labels)
        examples = dataset.examples
        found |= {"windows": len(dataset), "contexts": len(set(examples.values["context"]))}
        if examples.targets is not None:
            golds: list[Gold] = list(examples.targets)
            lengths = [len(text) for gold in golds for text, _ in gold.answers[:1]]
            found["answers"] = {
                "unit": "characters", "mean": float(np.mean(lengths)) if lengths else 0.0,
                "longest": max(lengths, default=0), "moved": sum(gold.moved for gold in golds),
            }  # fmt: skip
            if labels:
                answered = sum(bool(gold.answers) for gold in golds)
                found["labels"] = {"answer": answered, NO_ANSWER: len(golds) - answered}
        return found


def _golds_of(dataset: Dataset) -> list[list[str]]:
    """Return the texts of the right answers of each question."""
    return [[text for text, _ in gold.answers] for gold in dataset.examples.targets or ()]


def read_gold(table: Table, columns: dict[str, str], row: int) -> Gold:
    """Return the right answers of a row with their positions. Raises `ValueError` if the row is malformed."""

    def cell(name: str | None) -> Any:
        return table.columns[name][row] if name in table.columns else None

    impossible = str(cell("is_impossible")).strip().lower() in ("true", "1", "1.0")
    start = next((name for name in STARTS if name in table.columns), None)
    answers = read_answers(cell(columns["answers"]), cell(start), impossible)
    context = str(cell(columns["context"]))
    located = [locate(context, text, begin) for text, begin in answers]
    return Gold(tuple((text, begin) for text, begin, _ in located), sum(moved for *_, moved in located))


def _golds(table: Table, columns: dict[str, str], row: int) -> Gold | None:
    try:
        return read_gold(table, columns, row)
    except ValueError:
        return None  # reported when rows are validated
