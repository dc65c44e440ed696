"""Tagging: a tag for each word of a text, named entities or parts of speech."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.backbone.fit import check_token_ids
from graftkit.data.columns import Column
from graftkit.data.conll import SUFFIXES, conll_pieces, read_conll
from graftkit.data.read import read_table
from graftkit.data.source import Batch
from graftkit.data.stream import slices, stream_table
from graftkit.data.table import Table
from graftkit.errors import UserError
from graftkit.recipe.catalogue import option
from graftkit.tasks.base import Calls, Dataset, Examples, Learn, Reading, Task, Term, check_rows, one_term
from graftkit.tasks.explained import Aim, Cut, log_odds
from graftkit.tasks.shared.labels import LabelIndex
from graftkit.tasks.shared.metrics import calibration
from graftkit.tasks.shared.texts import made_up_texts, tokenizer_of
from graftkit.tasks.shared.weights import check_class_weights, class_weights
from graftkit.tasks.tag.aims import aim_at_word, cut_part
from graftkit.tasks.tag.entities import (
    accuracy_of,
    by_sentence,
    by_tag,
    chunks,
    entity_scores,
    names_of,
    scheme_of,
    tag_scores,
    types_of,
)
from graftkit.tasks.tag.parts import IGNORED, TagDataset, marks, rejoined, said, unsure_texts
from graftkit.tasks.tag.rows import (
    Sentence,
    Unfit,
    entities_of,
    label_of,
    marked,
    name_classes,
    numbers_of,
    read_sentence,
    shown,
    types_in,
)
from graftkit.tasks.tag.words import special_tokens, split_all, text_of


@dataclass(frozen=True)
class Tag(Task):
    """A tag for each word of a text: named entities, or parts of speech.

    A row is a list of tokens with their tags, or a text with character spans of its entities (start, end, label). Files
    are CoNLL files or tables. Tags that begin with B- and I- mark entities.
    """

    aliases: ClassVar[tuple[str, ...]] = ("token_classification", "ner", "pos", "sequence_labeling")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("tokens", ("words", "text", "sentence", "content", "document", "tweet"), "text"),
        Column(
            "tags",
            ("ner_tags", "ner", "entities", "spans", "pos_tags", "upos", "pos", "labels", "label"),
            "label",
        ),
    )
    labelled: ClassVar[tuple[str, ...]] = ("tags",)
    method: ClassVar[str] = "lora() + head()"
    per_token: ClassVar[bool] = True
    explains: ClassVar[bool] = True
    per_word: ClassVar[bool] = True
    calibrates: ClassVar[str | None] = "words"
    headline: ClassVar[tuple[str, ...]] = ("f1", "precision", "recall", "accuracy", "macro_f1")
    families: ClassVar[tuple[str, ...]] = ("TOKEN_CLASSIFICATION",)
    unsure = unsure_texts

    token_column: int = option(1, "CoNLL files: column of the token, from 1; negative counts from the end")
    tag_column: int = option(-1, "CoNLL files: column of the tag")
    class_weights: str | dict | None = option(
        None,
        "'balanced' weights words inversely to the frequency of their tag; or a weight per tag, {tag: weight}, or per "
        "entity type, {type: weight}",
        choices=("balanced",),
    )

    def read(self, source: Any, reading: Reading, name: str) -> Table:
        if _is_conll(source):
            return read_conll(
                str(source), encoding=reading.encoding, skip_bad=reading.skip_bad, token_column=self.token_column,
                tag_column=self.tag_column,
            )  # fmt: skip
        table = read_table(source, encoding=reading.encoding, skip_bad=reading.skip_bad, name=name)
        name_classes(table, source)
        return table

    def pieces(self, source: Any, reading: Reading, name: str, rows: int) -> Iterator[Table]:
        if _is_conll(source):
            places = self.token_column, self.tag_column
            return conll_pieces(str(source), reading.encoding, reading.skip_bad, places, rows)
        if isinstance(source, str | Path):
            return stream_table(
                source, encoding=reading.encoding, skip_bad=reading.skip_bad, name=name, rows=rows
            )
        return slices(self.read(source, reading, name), rows)

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        sentences = []
        for row in range(len(table)):
            try:
                sentences.append(_sentence(table, columns, row, tagged=True))
            except Unfit as problem:
                if not skip_bad:
                    raise UserError(f"{_told(table, row, problem)} {MEND}") from None
        types = types_in(sentences)
        if types is None:
            names = tuple(sorted({tag for sentence in sentences for tag in sentence.tags}))
            words = sum(len(sentence.tags) for sentence in sentences)
            if len(names) > max(100, words // 5):
                raise UserError(
                    f"column {columns['tags']!r} of {table.source} has {len(names)} different tags of {words} words, so it "
                    "does not look like tags. Name another with data.columns={tags: ...}, or in a CoNLL file with "
                    "task=tag(tag_column=...)."
                )
        else:
            names = names_of(types) if types else ()
        check_class_weights(by_tag(self.class_weights, names), names, self.name)
        if len(names) < 2:
            only = f"the one tag {names[0]!r}" if names else "no entity at all"
            raise UserError(f"{table.source} has {only}, so there is nothing to tell apart.")
        return names

    def examples(
        self, table: Table, columns: dict[str, str], labels: Sequence[str], skip_bad: bool, targets: bool = True
    ) -> Examples:  # fmt: skip
        index = LabelIndex(labels)
        good: list[tuple[Sentence, np.ndarray]] = []

        def problem(row: int) -> str | None:
            try:
                sentence = _sentence(table, columns, row, tagged=targets)
                numbers = numbers_of(sentence, labels, index) if targets else []
            except Unfit as unfit:
                return _told(table, row, unfit)
            good.append((sentence, np.array(numbers, dtype=np.int64)))
            return None

        kept, skipped = check_rows(table, problem, skip_bad)
        values: dict[str, list[Any]] = {"tokens": [sentence.value for sentence, _ in good]}
        if not targets:
            return Examples(kept, values, None, skipped)
        values["tags"] = [sentence.tags for sentence, _ in good]
        values["widened"] = [sentence.widened for sentence, _ in good]
        return Examples(kept, values, [numbers for _, numbers in good], skipped)

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        """Rows of a list of texts, or of lists of tokens; None for anything else."""
        if not items:
            raise UserError("there are no texts to predict; give one or more, or --data FILE.")
        if not all(isinstance(item, str | list | tuple) for item in items):
            return None
        for number, item in enumerate(items, start=1):
            if not item or (isinstance(item, str) and not item.strip()):
                raise UserError(f"text {number} of {len(items)} is empty; remove it, or fill it in.")
        return [{columns["tokens"]: item} for item in items]

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        return '"a text"'

    def made_up(self, columns: Mapping[str, str], labels: Sequence[str]) -> list[Any]:
        return made_up_texts(labels)

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> TagDataset:
        tokenizer = tokenizer_of(backbone, self)
        read = [text_of(value) for value in examples.values["tokens"]]
        texts, spans = [text for text, _ in read], [found for _, found in read]
        parts = split_all(tokenizer, texts, spans, max_length, backbone.source)
        check_token_ids(backbone, (part.ids for part in parts), lambda i: examples.where(parts[i].example))
        return TagDataset(examples, texts, spans, parts, tokenizer.pad_token_id or 0)

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        """Return the cross-entropy of logits (rows, length, labels) at the first token of each word."""
        assert isinstance(dataset, TagDataset) and dataset.labels is not None
        placed = np.concatenate(dataset.labels)
        counts = np.bincount(placed[placed != IGNORED], minlength=len(labels))
        weights = class_weights(by_tag(self.class_weights, labels), counts, labels)

        def scores(logits: Tensor, batch: Batch) -> Term:
            targets = batch.targets
            assert targets is not None
            losses = torch.nn.functional.cross_entropy(
                logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none",
                label_smoothing=label_smoothing,
            )  # fmt: skip
            if weights is not None:
                losses = losses * weights.to(losses.device, non_blocking=True)[targets.clamp(min=0)]
            return Term(losses.sum(dim=1), (logits.detach().argmax(-1) == targets).sum(dim=1))

        return one_term(scores)

    def outcomes(self, forward: Calls, batch: Batch) -> Sequence[Any]:
        """Return the most likely label of each word, its probability, and the loss, (words, 3) in fp32 for each row."""
        log_probs = forward(batch).float().log_softmax(dim=-1).cpu().numpy()
        dataset = batch.source
        assert isinstance(dataset, TagDataset)
        found = []
        for i, row in enumerate(batch.rows):
            part = dataset.parts[row]
            logs = log_probs[i, part.places]
            outcome = np.full((len(logs), 3), np.nan, dtype=np.float32)
            outcome[:, 0] = logs.argmax(axis=1)
            outcome[:, 1] = np.exp(logs.max(axis=1))
            if dataset.labels is not None:
                wanted = dataset.labels[row][part.places[part.own]]
                outcome[part.own, 2] = -logs[part.own, wanted]
            found.append(outcome)
        return found

    def graded(self, outputs: Tensor) -> Tensor:
        return log_odds(outputs.log_softmax(-1))

    def aim(
        self, dataset: Dataset, outputs: Callable[[int], Tensor], labels: Sequence[str], label: str | None,
        word: str | None,
    ) -> Aim:  # fmt: skip
        return aim_at_word(dataset, lambda row: self.graded(outputs(row))[0], labels, label, word)

    def divide(self, dataset: Dataset, row: int, backbone: Backbone, inputs: dict[str, Tensor]) -> Cut:
        return cut_part(dataset, row, len(special_tokens(tokenizer_of(backbone, self))[1]))

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        """Compute entity metrics as conlleval does; for other tags accuracy and macro F1. `rows` are sentences."""
        answers, types = rejoined(outcomes, dataset, labels), types_of(labels)
        wanted: Any = dataset.examples.targets
        right = np.array([(answer.labels == gold).sum() for answer, gold in zip(answers, wanted)])
        words = np.array([len(gold) for gold in wanted])
        found = accuracy_of(right, words, intervals)
        if types:
            gold, guess = (
                [chunks([labels[number] for number in row]) for row in rows]
                for rows in (wanted, [answer.labels for answer in answers])
            )
            found = entity_scores(gold, guess, types, intervals) | found
        else:
            found |= tag_scores(wanted, [answer.labels for answer in answers], labels, intervals)
        losses = np.concatenate([answer.losses for answer in answers])
        known = losses[~np.isnan(losses)]
        if intervals:
            certain = np.concatenate([answer.probabilities for answer in answers])
            found["calibration"] = calibration(
                certain, np.concatenate([a.labels == g for a, g in zip(answers, wanted)])
            )
        return {
            **found,
            "loss": float(known.mean()) if len(known) else 0.0,
            "rows": len(wanted),
            "words": int(words.sum()),
        }

    def by_row(self, outcomes: Sequence[Any], dataset: Any, labels: Sequence[str]) -> dict[str, np.ndarray]:
        return by_sentence(dataset.examples.targets, [a.labels for a in rejoined(outcomes, dataset, labels)], labels)  # fmt: skip

    def figures(self, labels: Sequence[str]) -> dict[str, str]:
        """Return the metrics of entities, or of independent tags."""
        names = ("f1", "precision", "recall", "accuracy") if types_of(labels) else ("accuracy", "macro_f1")
        return {**dict.fromkeys(names, "max"), "loss": "min"}

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the entities or words of a text with their character spans; for a list of tokens a tag for each.

        The probability of an entity is the mean over its words.
        """
        assert isinstance(dataset, TagDataset)
        found, types = [], types_of(labels)
        for i, answer in enumerate(rejoined(outcomes, dataset, labels)):
            tags = [labels[number] for number in answer.labels]
            probabilities = [round(float(probability), 4) for probability in answer.probabilities]
            text, spans = dataset.texts[i], dataset.spans[i]
            if not isinstance(dataset.examples.values["tokens"][i], str):
                found.append({"tags": tags, "probabilities": probabilities})
            elif types:
                entities = entities_of(tags, text, spans)
                for entity in entities:
                    first, last = entity.pop("words")
                    entity["probability"] = round(float(answer.probabilities[first:last].mean()), 4)
                found.append({"entities": entities})
            else:
                found.append({"tags": [
                    {"start": start, "end": end, "label": tag, "text": text[start:end], "probability": probability}
                    for (start, end), tag, probability in zip(spans, tags, probabilities)
                ]})  # fmt: skip
        return found

    def asked(self, examples: Examples, row: int) -> dict[str, Any]:
        value = examples.values["tokens"][row]
        return {"text" if isinstance(value, str) else "tokens": value}

    def line(self, answer: dict[str, Any]) -> str:
        """Format the text with its entities marked, or with a tag after each word."""
        if "entities" in answer:
            return marked(answer["text"], answer["entities"])
        if "text" in answer:
            return " ".join(f"{word['text']}/{word['label']}" for word in answer["tags"])
        return shown(answer["tokens"], answer["tags"])

    def worst(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """Return sentences with a wrong tag, largest loss first."""
        examples, answers = dataset.examples, rejoined(outcomes, dataset, labels)
        targets: Any = examples.targets
        losses = [float(np.nansum(answer.losses)) for answer in answers]
        wrong = [i for i, answer in enumerate(answers) if (answer.labels != targets[i]).any()]
        assert isinstance(dataset, TagDataset)
        return [
            {
                "where": examples.where(i),
                "text": dataset.texts[i],
                "expected": said(dataset, i, targets[i], labels, answers[i].labels),
                "answer": said(dataset, i, answers[i].labels, labels, targets[i]),
                "marks": {
                    "of": "text",
                    "expected": marks(dataset, i, targets[i], labels, answers[i].labels),
                    "answer": marks(dataset, i, answers[i].labels, labels, targets[i]),
                },
                "loss": round(losses[i], 4),
            }
            for i in sorted(wrong, key=lambda i: -losses[i])[:count]
        ]

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        """Add words, entities or words by label, and what was done to align tags with words."""
        found, examples = super().statistics(dataset, labels), dataset.examples
        assert isinstance(dataset, TagDataset)
        placed = sum(len(part.words) for part in dataset.parts)
        found["words"] = sum(map(len, dataset.spans))
        found["words_without_token"] = found["words"] - placed
        found["split"] = len(dataset.parts) - len(examples)
        targets: Any = examples.targets
        if targets is None:
            return found
        types, counts = types_of(labels), Counter(np.concatenate(targets).tolist())
        notes = []
        if types:
            tagged = [[labels[i] for i in row] for row in targets]
            number = Counter(kind for tags in tagged for _, _, kind in chunks(tags))
            found["labels"], found["counted"] = {label_of(kind): number[kind] for kind in types}, "entities"
            scheme = scheme_of(examples.values["tags"])
            found["scheme"], found["spans_widened"] = scheme, sum(examples.values["widened"])
            changed = sum(
                a != b for row, tags in zip(examples.values["tags"], tagged) for a, b in zip(row, tags)
            )
            if changed and scheme != "BIO":
                notes.append(f"tags are {scheme} and are read as BIO")
            elif changed:
                notes.append(f"tags I- with no B- before them, read as B-: {changed:,}")
            if found["spans_widened"]:
                notes.append(f"entities that end within a word, widened to it: {found['spans_widened']:,}")
        else:
            found["labels"], found["counted"] = {tag: counts[i] for i, tag in enumerate(labels)}, "words"
        if found["split"]:
            notes.append(
                f"further parts of sentences that are longer than the model takes: {found['split']:,}"
            )
        if found["words_without_token"]:
            notes.append(
                f"words that are nothing to the tokenizer, not learned: {found['words_without_token']:,}"
            )
        found["notes"] = notes
        return found


MEND = "Fix the row, or skip bad rows with data.skip_bad=true."


def _is_conll(source: Any) -> bool:
    return isinstance(source, str | Path) and Path(source).suffix.lower() in SUFFIXES


def _sentence(table: Table, columns: dict[str, str], row: int, tagged: bool) -> Sentence:
    tags = table.columns[columns["tags"]][row] if tagged else None
    return read_sentence(table.columns[columns["tokens"]][row], tags, tagged)


def _told(table: Table, row: int, problem: Unfit) -> str:
    return f"{table.where(row)}: {problem}."
