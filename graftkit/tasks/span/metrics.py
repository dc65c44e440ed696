"""Exact match and F1 as in SQuAD's official scripts, and the best threshold for predicting no answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from graftkit.tasks.shared.metrics import mean_interval

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text in lower case, without ASCII punctuation and English articles, and with single spaces (evaluate-v1.1
    and -v2.0)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    return float(normalised(answer) == normalised(gold))


def f1(answer: str, gold: str, second: bool) -> float:
    """Return the harmonic mean of word precision and recall. `second`: follow SQuAD 2.0, in which two texts without words
    score 1; in 1.1 they score 0."""
    left, right = normalised(answer).split(), normalised(gold).split()
    if second and not (left and right):
        return float(left == right)
    same = sum((Counter(left) & Counter(right)).values())
    return 2 * same / (len(left) + len(right)) if same else 0.0


def score(answer: str, golds: Sequence[str], second: bool) -> tuple[float, float]:
    """Return the exact match and F1 of an answer, each the maximum over the gold answers.

    SQuAD 2.0 (`second`) ignores gold answers without words; if none is left, the correct answer is ''.
    """
    if second:
        golds = [gold for gold in golds if normalised(gold)] or [""]
    return max(exact_match(answer, gold) for gold in golds), max(f1(answer, gold, second) for gold in golds)


def best_threshold(differences: Sequence[float], answered: Sequence[float], golds: Sequence[bool]) -> float:
    """Return the threshold with the largest mean F1 if questions whose lead exceeds it get no answer (find_best_thresh
    of evaluate-v2.0). It is the midpoint between two leads.

    `differences`: lead of each question, the null score minus the score of its best span. `answered`: F1 of each question
    if it gets an answer. `golds`: whether each question has an answer.
    """
    order = np.argsort(differences, kind="stable")
    leads = np.asarray(differences, dtype=float)[order]
    gains = np.asarray(answered, dtype=float)[order] - (~np.asarray(golds, dtype=bool)[order]).astype(float)
    totals = np.concatenate([[0.0], np.cumsum(gains)])  # gain of answering the first k over answering none
    cuts = [0, *(np.flatnonzero(np.diff(leads) > 0) + 1), len(leads)]  # never between equal leads
    best = max(cuts, key=lambda cut: (totals[cut], cut))
    if best == 0:
        return float(leads[0] - 1)
    return float(leads[-1] + 1) if best == len(leads) else float((leads[best - 1] + leads[best]) / 2)


def figures(
    exact: np.ndarray, f1s: np.ndarray, answerable: np.ndarray, second: bool, intervals: bool = True
) -> dict[str, Any]:
    """Return the means over all questions with 95% bootstrap intervals; for SQuAD 2.0 (`second`) also the means over
    questions with and without an answer."""
    found: dict[str, Any] = {
        "f1": float(f1s.mean()), **mean_interval("f1", f1s, intervals),
        "exact_match": float(exact.mean()), **mean_interval("exact_match", exact, intervals),
    }  # fmt: skip
    if second:
        for name, part in (("has_answer", answerable), ("no_answer", ~answerable)):
            found[f"{name}_rows"] = int(part.sum())
            if part.any():
                found[f"{name}_f1"] = float(f1s[part].mean())
                found[f"{name}_exact_match"] = float(exact[part].mean())
    return found
