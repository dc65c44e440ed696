"""Tell rows that are like none of the labels, by their distance to training rows in the features that the last layer reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.insight.confidence_evidence import Evidence
from graftkit.insight.knn import unit

ROWS = 10_000  # training rows that are kept, at most
VALUES = 4_000_000  # of their features, at most: 8 MB in fp16
NEAREST = 2
BATCH = 256
ENOUGH = 2000  # evaluation rows for a threshold
SHARE = 0.95  # of the evaluation rows that are known


@dataclass(frozen=True)
class Known:
    """Features of training rows, `vectors` (rows, width) of length 1 in fp16, and their `labels` (rows,).

    A row is known if its mean cosine similarity with the two nearest of them, among those of the label that the model
    gives it, is at least `threshold`: the distance to nearest neighbours of Sun et al. 2022, "Out-of-Distribution Detection
    with Deep Nearest Neighbors", within a label. Where a row has any number of labels, all rows have the label 0.
    """

    vectors: np.ndarray
    labels: np.ndarray
    threshold: float

    def similarity(self, features: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Return the similarity of rows, (rows,). `features` (rows, width), `logits` (rows, labels)."""
        given = logits.argmax(1) if self.labels.any() else np.zeros(len(logits), np.int64)
        vectors = self.vectors.astype(np.float32)
        found = [
            self._nearest(unit(features[i : i + BATCH]) @ vectors.T, given[i : i + BATCH])
            for i in range(0, len(features), BATCH)
        ]
        return np.concatenate(found)

    def _nearest(self, near: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Return the mean of the largest similarities of each row with those of its label. `near` (rows, kept rows)."""
        other = self.labels[None] != given[:, None]
        other[other.all(1)] = False  # a label without rows: all rows count
        near[other] = -np.inf
        near.partition(near.shape[1] - min(NEAREST, near.shape[1]), axis=1)
        nearest = near[:, -NEAREST:]
        there = np.isfinite(nearest)
        return np.where(there, nearest, 0).sum(1) / there.sum(1)

    def of(self, features: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Return whether rows are known, (rows,) bool."""
        return self.similarity(features, logits) >= self.threshold

    def tensors(self) -> dict[str, Tensor]:
        return {"vectors": torch.from_numpy(self.vectors), "labels": torch.from_numpy(self.labels)}

    @staticmethod
    def read(tensors: Mapping[str, Tensor], threshold: Any) -> Known | None:
        """Return what was written, or None if it is not that."""
        vectors, numbers = tensors.get("vectors"), tensors.get("labels")
        if set(tensors) != {"vectors", "labels"} or vectors is None or numbers is None:
            return None
        good = vectors.dtype == torch.float16 and vectors.dim() == 2 and len(vectors) and vectors.shape[1]
        good = good and numbers.dtype == torch.int32 and numbers.shape == vectors.shape[:1]
        if not good or not isinstance(threshold, float) or not -2 <= threshold <= 2:
            return None
        return Known(vectors.numpy(), numbers.numpy(), threshold)


def reference_rows(labels: np.ndarray, most: int, width: int) -> np.ndarray:
    """Return numbers of training rows to keep, at most `most`: as many of each label as there is room for.

    `labels` (rows,); all 0 where a row has any number of labels.
    """
    most = max(1, min(most, ROWS, VALUES // max(1, width)))
    order = np.random.default_rng(0).permutation(len(labels))
    grouped = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[grouped], return_index=True, return_counts=True)
    place = np.empty(len(labels), np.int64)  # of a row among those of its label
    place[grouped] = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(order[np.argsort(place[order], kind="stable")][:most])


def fit_known(training: Evidence, evaluation: Evidence, share: float = SHARE) -> tuple[Known | None, str]:
    """Return what tells unknown rows, with the threshold at which `share` of the evaluation rows are known; None if there
    are too few of them, and a note of it.
    """
    assert training.features is not None
    single = training.targets.ndim == 1
    labels = training.targets if single else np.zeros(len(training.targets))
    found = Known(unit(training.features).astype(np.float16), labels.astype(np.int32), 0.0)
    return with_share(found, evaluation, share)


def with_share(known: Known, evaluation: Evidence, share: float) -> tuple[Known | None, str]:
    """Return `known` with the threshold at which `share` of the evaluation rows are known; None if there are too few of
    them, and a note of it."""
    assert evaluation.features is not None
    every = slice(None, None, math.ceil(len(evaluation.logits) / ENOUGH))
    similar = np.sort(known.similarity(evaluation.features[every], evaluation.logits[every]))
    place = math.floor(round((len(similar) + 1) * (1 - share), 9))
    if place < 1:
        few = f"{len(similar)} evaluation rows are too few for a threshold at which {share:.6g} of them are known"
        return None, few
    # between two rows, so that rounding moves neither across it
    above = float(similar[place - 1])
    below = float(similar[place - 2]) if place > 1 else above - 0.01
    return replace(known, threshold=(above + below) / 2), ""
