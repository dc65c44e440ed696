"""Labels that are likely wrong, near duplicates and outliers in the data of a recipe, by the features of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.data.folders import FileTable
from graftkit.errors import UserError
from graftkit.insight.confidence_evidence import WORDS
from graftkit.insight.features import Words, features_of, word_features
from graftkit.insight.labels import Judged, fitted, judge, out_of_fold
from graftkit.insight.near import Neighbours, centred, near_pairs, neighbours, outliers
from graftkit.insight.repeated import Pair, answers_of, inputs_of
from graftkit.recipe.schema import Recipe
from graftkit.runs.features import frozen_backbone
from graftkit.runs.prepare import Rows
from graftkit.tasks.base import Dataset, Examples, Task

NEAREST = 3  # training rows shown beside a suspect


@dataclass(frozen=True)
class Suspicions:
    """What the features of rows tell. `suspects` and `outliers` are plain values, the worst first; `near`: pairs of rows
    that are nearly the same, without those that are equal."""

    suspects: list[dict[str, Any]]
    outliers: list[dict[str, Any]]
    near: list[Pair]


def refuse_without_classes(task: Task) -> None:
    """Raise `UserError` for a task whose rows do not have labels of a fixed set, one or several for a whole row."""
    why = None
    if not task.head:
        why = "trains no head that reads features"
    elif task.per_token and task.calibrates != WORDS:
        why = "answers with a part of a text, so there is no fixed set of labels"
    if why is not None:
        raise UserError(
            f"labels of {task.name}() cannot be checked: it {why}. This needs a task with classes, such as classify; leave "
            "--labels out."
        )


def suspicions(
    recipe: Recipe,
    task: Task,
    columns: dict[str, str],
    labels: tuple[str, ...],
    parts: Mapping[str, Examples],
) -> Suspicions:
    """Compute the features of all parts, and what they tell. Raises `UserError` for a task without classes, too few rows,
    or features that are not finite."""
    train = parts["train"]
    words = task.calibrates == WORDS
    targets = np.zeros(0, int) if words else np.asarray(train.targets)
    if not labels or targets.ndim > 2 or targets.dtype.kind not in "if":
        raise UserError(
            f"labels of {recipe.task} cannot be checked: its rows have no labels of a fixed set. This needs a task with "
            "classes; leave --labels out."
        )
    task = task.resolve(train, labels, recipe.seed)
    held = parts.get("eval")
    reading = frozen_backbone(recipe, Rows(task, columns, labels, train, held, parts.get("test")))
    datasets = {name: reading.dataset(examples) for name, examples in parts.items()}
    kept = {name: dataset.examples for name, dataset in datasets.items()}
    values = {
        name: by_example(features_of(reading.forward, one).values, one) for name, one in datasets.items()
    }
    if not words:
        return _told(task, labels, kept, values, recipe.seed)
    of_words = {name: word_features(reading.forward, one) for name, one in datasets.items()}
    return _told(task, labels, kept, values, recipe.seed, (datasets, of_words))


def by_example(values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Return features by example, (examples, width): the mean over the parts of a long text."""
    if len(dataset) == len(dataset.examples):
        return values
    examples = np.array([dataset.example(row) for row in range(len(dataset))])
    found = np.zeros((len(dataset.examples), values.shape[1]), np.float32)
    np.add.at(found, examples, values)
    return found / np.maximum(np.bincount(examples, minlength=len(found)), 1)[:, None]


def _told(
    task: Task, labels: tuple[str, ...], parts: Mapping[str, Examples], values: Mapping[str, np.ndarray], seed: int,
    words: tuple[Mapping[str, Dataset], Mapping[str, Words]] | None = None,
) -> Suspicions:  # fmt: skip
    mean = values["train"].mean(0, dtype=np.float64)
    ways = {name: centred(part, mean) for name, part in values.items()}
    suspects, far = [], []
    for name, examples in parts.items():
        around = neighbours(ways[name], ways["train"], itself=name == "train")
        if words is None:
            targets, known = np.asarray(examples.targets), np.asarray(parts["train"].targets)
            if name == "train":
                probabilities = out_of_fold(values[name], targets, len(labels), seed)
            else:
                probabilities = fitted(values["train"], known, values[name], len(labels))
            suspects += _suspects(task, labels, name, parts, judge(probabilities, targets), around)
        else:
            suspects += word_suspects(task, labels, name, *words, seed)
        far += [
            {
                **place(parts[name], name, row),
                "text": text_of(task, examples, row),
                "distance": round(distance, 4),
            }
            for row, distance in outliers(around)
        ]
    near = _near(task, labels, parts, ways)
    suspects.sort(key=lambda one: -one["score"])
    far.sort(key=lambda one: -one["distance"])
    return Suspicions(suspects, far, near)


def _suspects(
    task: Task, labels: Sequence[str], name: str, parts: Mapping[str, Examples], judged: Judged, around: Neighbours
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows for which another answer is more likely than their own, worst first."""
    examples, train, found = parts[name], parts["train"], []
    targets, known = np.asarray(examples.targets), np.asarray(train.targets)
    for row in np.argsort(-judged.scores, kind="stable").tolist():
        if judged.scores[row] <= 0.5:
            break
        nearest = around.rows[row, :NEAREST].tolist()
        found.append({
            **place(examples, name, row), "text": text_of(task, examples, row), "given": named_label(targets[row], labels),
            "suggested": named_label(judged.suggested[row], labels), "score": round(float(judged.scores[row]), 4),
            "nearest": nearest,
            "nearest_rows": [
                {"line": place(train, "train", near)["line"], "label": named_label(known[near], labels), "text": text_of(task, train, near)}
                for near in nearest
            ],
        })  # fmt: skip
    return found


def word_suspects(
    task: Task, labels: Sequence[str], name: str, datasets: Mapping[str, Dataset], words: Mapping[str, Words], seed: int
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the words for which another label is more likely than their own. `nearest`: the rows of the nearest words."""
    train, own = words["train"], words[name]
    if name == "train":
        probabilities = out_of_fold(train.values, train.targets, len(labels), seed, train.rows)
    else:
        probabilities = fitted(train.values, train.targets, own.values, len(labels))
    judged = judge(probabilities, own.targets)
    chosen = np.argsort(-judged.scores, kind="stable")
    chosen = chosen[judged.scores[chosen] > 0.5]
    if not len(chosen):
        return []
    mean = train.values.mean(0, dtype=np.float64)
    near = neighbours(centred(own.values[chosen], mean), centred(train.values, mean), NEAREST + 1).rows
    examples, dataset, found = datasets["train"].examples, datasets[name], []
    for at, others in zip(chosen.tolist(), near.tolist()):
        around = [other for other in others if name != "train" or other != at][:NEAREST]
        row = dataset.example(int(own.rows[at]))
        told = [_word(datasets["train"], train, other) for other in around]
        found.append({
            **place(dataset.examples, name, row), "text": text_of(task, dataset.examples, row), **_word(dataset, own, at)[1],
            "given": labels[own.targets[at]], "suggested": labels[judged.suggested[at]], "score": round(float(judged.scores[at]), 4),
            "nearest": [there for there, _ in told],
            "nearest_rows": [
                {"line": file_of(examples, there)["line"], "label": labels[train.targets[other]],
                 "text": text_of(task, examples, there), "word": about["word"]}
                for other, (there, about) in zip(around, told)
            ],
        })  # fmt: skip
    return found


def _word(dataset: Dataset, words: Words, at: int) -> tuple[int, dict[str, Any]]:
    """Return the example of a word, and the word with its characters in the text."""
    row = int(words.rows[at])
    return dataset.example(row), dataset.about(row, int(words.numbers[at]))


def named_label(target: Any, labels: Sequence[str]) -> str | list[str]:
    """Return a label by its index, or a list of labels by a multi-hot row."""
    if np.ndim(target) == 0:
        return labels[int(target)]
    return [label for label, given in zip(labels, target) if given]


def _near(
    task: Task, labels: tuple[str, ...], parts: Mapping[str, Examples], ways: Mapping[str, np.ndarray]
) -> list[Pair]:
    """Return the pairs of rows, of all parts, that are nearly the same and not equal; each pair once."""
    keys = {name: inputs_of(task, examples) for name, examples in parts.items()}
    inputs = {name: _inputs(task, examples) for name, examples in parts.items()}
    answers = {name: answers_of(task, examples, labels) for name, examples in parts.items()}
    names = list(parts)
    found: dict[tuple[str, int, str, int], Pair] = {}
    for at, name in enumerate(names):
        for other in names[: at + 1]:
            around = neighbours(ways[name], ways[other], itself=name == other)
            for row, there, cosine in near_pairs(around, inputs[name], inputs[other]):
                if keys[name][row] == keys[other][there]:
                    continue
                if name == other:  # each pair is found from both sides
                    row, there = max(row, there), min(row, there)
                same = answers[name][row] == answers[other][there]
                found[name, row, other, there] = Pair(name, row, other, there, round(cosine, 4), False, same)
    return sorted(
        found.values(), key=lambda pair: (names.index(pair.data), pair.row, names.index(pair.other))
    )


def _inputs(task: Task, examples: Examples) -> list[tuple[Any, ...]]:
    names = [column.name for column in task.columns if column.name not in task.labelled]
    columns = [examples.values[name] for name in names if name in examples.values]
    return list(zip(*columns))


def place(examples: Examples, name: str, row: int) -> dict[str, Any]:
    """Return where a row is: `data` (train, eval or test), `file`, `line` and `row`, which counts from 0."""
    return {"data": name, **file_of(examples, row), "row": row}


def file_of(examples: Examples, row: int) -> dict[str, Any]:
    """Return the `file` of a row and its `line`. A folder of files has no lines, so `file` is the row's own."""
    table = examples.table
    if isinstance(table, FileTable) and table.places:
        return {"file": table.places[row], "line": None}
    return {"file": table.source, "line": table.numbers[row]}


def text_of(task: Task, examples: Examples, row: int) -> str:
    """Return the inputs of a row as one text: for images and recordings, their names."""
    asked = task.asked(examples, row).values()
    return " | ".join(" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in asked)


def pairs_as_values(task: Task, pairs: Sequence[Pair], parts: Mapping[str, Examples]) -> list[dict[str, Any]]:
    """Return pairs as plain values: the place of a row, its text, and `of`, the earlier row that it repeats."""

    def about(name: str, row: int) -> dict[str, Any]:
        return {**place(parts[name], name, row), "text": text_of(task, parts[name], row)}

    return [
        {
            **about(pair.data, pair.row), "of": about(pair.other, pair.other_row),
            "kind": "exact" if pair.exact else "near", "similarity": pair.similarity, "same_label": pair.same,
        }
        for pair in pairs
    ]  # fmt: skip
