"""Which backbone suits the data, before anything is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.backbone.source import Source, find_source, modality_of
from graftkit.data.split import hold_out
from graftkit.errors import UserError, listing
from graftkit.insight.baselines import bag_of_words, most_frequent
from graftkit.insight.features import features_of
from graftkit.insight.gap import not_better, shift_of, signs_of
from graftkit.insight.knn import neighbours_vote
from graftkit.insight.logme import logme
from graftkit.insight.probe import Figure, difference, figure, folds_of, out_of_fold
from graftkit.insight.targets import targets_of
from graftkit.recipe import schema as recipes
from graftkit.recipe.schema import Recipe
from graftkit.runs.features import frozen_backbone
from graftkit.runs.prepare import Rows, make_task, prepare_rows
from graftkit.tasks.base import Examples, Task

ROWS = 20_000  # at most; a sample with as many of each class tells as much, and the features of all would take longer
TEXTS = ("text", "text_pair")
NOUNS = {"text": "texts", "image": "images", "audio": "sounds"}


@dataclass(frozen=True)
class ModelFit:
    """How well a backbone suits the rows. `probe`: a linear model of its features, in five-fold cross-validation; `knn`: the
    votes of the ten nearest other rows; `logme`: the evidence of a linear model per row (larger is better). `behind`: 95%
    interval of the probe's metric minus that of the first model's; None for the first. `seconds`: with computing features.
    `warnings`: signs that the model was pre-trained on something else."""

    model: str
    probe: Figure
    knn: Figure
    logme: float
    seconds: float
    warnings: tuple[str, ...]
    behind: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        found = {name: dict(vars(getattr(self, name))) for name in ("probe", "knn")}
        return {
            "model": self.model, **found, "logme": self.logme, "behind": self.behind, "seconds": round(self.seconds, 2),
            "warnings": list(self.warnings),
        }  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """What `graftkit fit` found. `models`: best first. `baselines`: what needs no model: `most_frequent` (the same answer
    for all rows) and, for texts, `bag_of_words`, cross-validated on the same folds as the probes. `rows`: used; of `of`."""

    models: tuple[ModelFit, ...]
    baselines: Mapping[str, Figure]
    rows: int
    of: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "models": [model.as_dict() for model in self.models],
            "baselines": {name: dict(vars(found)) for name, found in self.baselines.items()},
            "rows": self.rows, "of": self.of,
        }  # fmt: skip


def fit(
    models: str | Path | Sequence[str | Path],
    *,
    train: Any,
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Fit:
    """Tell which backbone suits labelled rows, before training: `graftkit fit` in Python.

    Computes the features of each model once, keeps them in the cache that runs use too, and tells how much of the answers a
    linear probe, the nearest rows and LogME read from them. `train` and `settings` are those of `tune`; all rows are used, up
    to 20,000. For `classify`, `image_classify` and `audio_classify`.

    Raises `UserError` for models of different modality, a task whose rows have no answer of their own, and features that
    are not finite.

    >>> graftkit.fit(["model-a", "model-b"], train="train.csv").models[0].model  # doctest: +SKIP
    """
    names = [str(models)] if isinstance(models, str | Path) else [str(model) for model in models]
    values, tables = recipes.gather(None, {"train": train, "eval": None}, {"task": task}, settings)
    return fit_values(names, values, tables)


def fit_values(names: Sequence[str], values: Mapping[str, Any], tables: Mapping[str, Any]) -> Fit:
    """Fit nested recipe values, with tables in memory by name, for each of several models."""
    if not names:
        raise UserError("name one model or more: graftkit fit MODEL ... --train FILE.")
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UserError(f"model {twice[0]!r} is named more than once; name each model once.")
    first, *others = (recipes.make({**values, "model": name}) for name in names)
    task = make_task(first.task)
    refuse_several_answers(task, "fit")
    sources = [find_source(name, first.weights, first.quantize) for name in names]
    _refuse_modalities(sources, task)
    rows = prepare_rows(first, tables.get("train"))
    of = len(rows.train)
    rows = replace(rows, train=_sample(rows.train, first.seed))
    fitting = _Fitting(rows)
    found = [fitting.model(recipe, source) for recipe, source in zip((first, *others), sources)]
    return Fit(fitting.ranked(found), fitting.baselines(), len(rows.train), of)


def refuse_several_answers(task: Task, command: str) -> None:
    """Raise `UserError` unless a row of a task has features and an answer of its own."""
    if not (task.head and task.one_answer):
        raise UserError(
            f"`graftkit {command}` is for tasks whose rows have one answer each (classify, image_classify, audio_classify); "
            f"{task.name}() has {'answers within its rows' if task.head else 'no head that reads features'}."
        )


def _refuse_modalities(sources: Sequence[Source], task: Task) -> None:
    """Raise `UserError` for models that read different things, or not what the task's rows are."""
    known = [(source.name, modality) for source in sources if (modality := modality_of(source)) is not None]
    other = next(((name, what) for name, what in known if what != known[0][1]), None)
    if other is not None:
        (name, what), (second, that) = known[0], other
        raise UserError(
            f"model {name!r} reads {NOUNS[what]} and {second!r} reads {NOUNS[that]}, so they cannot be compared on the same rows; "
            "name models of one kind."
        )
    if known and known[0][1] != task.modality:
        name, what = known[0]
        raise UserError(
            f"model {name!r} reads {NOUNS[what]}, but {task.name}() is for {NOUNS[task.modality]}; name another --task or model."
        )


def _sample(examples: Examples, seed: int) -> Examples:
    """Return at most 20,000 examples, with about as many of each answer as in all."""
    if len(examples) <= ROWS:
        return examples
    targets = examples.targets
    kept = hold_out(
        targets.tolist() if isinstance(targets, np.ndarray) else [0] * len(examples),
        ROWS / len(examples),
        seed,
    )
    return examples.take(kept[1])


class _Fitting:
    """The measures of several models on the same rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.targets = targets_of(rows.train.targets, rows.labels)
        self.folds = folds_of(self.targets)
        self.texts = [rows.train.values[name] for name in TEXTS if name in rows.train.values]
        self.same = most_frequent(self.targets)
        pairs = self.texts[1] if len(self.texts) > 1 else None
        self.words = bag_of_words(self.texts[0], pairs, self.targets, self.folds) if self.texts else None
        self.scores: dict[str, np.ndarray] = {}

    def model(self, recipe: Recipe, source: Source) -> ModelFit:
        began = time.monotonic()
        reading = frozen_backbone(recipe, self.rows, source)
        dataset = reading.dataset(self.rows.train)
        if len(dataset) != len(self.rows.train):
            raise UserError(
                f"{recipe.model} cannot read {len(self.rows.train) - len(dataset):,} of the rows "
                f"({listing(dataset.examples.skipped, 3)}); leave them out, so that models are compared on the same rows."
            )
        features = features_of(reading.forward, dataset).values
        scores = out_of_fold(features, self.targets, self.folds)
        near = neighbours_vote(features, self.targets)
        self.scores[recipe.model] = scores
        warnings = [
            *dataset.warnings(),
            *signs_of(dataset, self.texts),
            *shift_of(reading.forward, dataset),
            *self._baselines_beaten(scores),
        ]
        evidence = logme(features, self.targets.table)
        probe, knn = figure(scores, self.targets), figure(near, self.targets)
        return ModelFit(recipe.model, probe, knn, evidence, time.monotonic() - began, tuple(warnings))

    def _baselines_beaten(self, scores: np.ndarray) -> list[str]:
        told = not_better(scores, self.same, self.targets, "the most frequent answer for all rows")
        if told or self.words is None:
            return told
        return not_better(scores, self.words, self.targets, "a bag of words, which needs no model")

    def baselines(self) -> dict[str, Figure]:
        given = {"most_frequent": self.same, "bag_of_words": self.words}
        return {name: figure(scores, self.targets) for name, scores in given.items() if scores is not None}

    def ranked(self, found: Sequence[ModelFit]) -> tuple[ModelFit, ...]:
        best, *others = sorted(found, key=lambda one: (one.probe.value, one.logme), reverse=True)
        top = self.scores[best.model]
        return best, *(
            replace(one, behind=difference(self.scores[one.model], top, self.targets)) for one in others
        )
