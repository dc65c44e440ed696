"""Exact match and F1 of answers as SQuAD's official scripts count them, and the threshold for having no answer."""

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
    """In lower case, without ASCII punctuation, English articles and blanks beyond one (evaluate-v1.1 and -v2.0)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    return float(normalised(answer) == normalised(gold))


def f1(answer: str, gold: str, second: bool) -> float:
    """Harmonic mean of the precision and recall of words. `second`: as SQuAD 2.0 has it, where two texts without
    words are alike; in 1.1 they have nothing in common."""
    left, right = normalised(answer).split(), normalised(gold).split()
    if second and not (left and right):
        return float(left == right)
    same = sum((Counter(left) & Counter(right)).values())
    return 2 * same / (len(left) + len(right)) if same else 0.0


def score(answer: str, golds: Sequence[str], second: bool) -> tuple[float, float]:
    """Exact match and F1 of an answer, the best over all right ones.

    In SQuAD 2.0 right answers without words do not count, and a question that has none is to be answered by ''.
    """
    if second:
        golds = [gold for gold in golds if normalised(gold)] or [""]
    return max(exact_match(answer, gold) for gold in golds), max(f1(answer, gold, second) for gold in golds)


def best_threshold(differences: Sequence[float], answered: Sequence[float], golds: Sequence[bool]) -> float:
    """The threshold of the null score's lead above which no answer gives the largest mean F1 (find_best_thresh of
    evaluate-v2.0). A question whose lead is larger than it gets no answer.

    `differences`: the lead of each question; `answered`: its F1 where it is answered; `golds`: whether it has an
    answer. Between two leads the middle is taken.
    """
    order = np.argsort(differences, kind="stable")
    leads = np.asarray(differences, dtype=float)[order]
    gains = np.asarray(answered, dtype=float)[order] - (~np.asarray(golds, dtype=bool)[order]).astype(float)
    totals = np.concatenate([[0.0], np.cumsum(gains)])  # of answering the first so many, less answering none
    cuts = [0, *(np.flatnonzero(np.diff(leads) > 0) + 1), len(leads)]  # equal leads are cut together
    best = max(cuts, key=lambda cut: (totals[cut], cut))
    if best == 0:
        return float(leads[0] - 1)
    return float(leads[-1] + 1) if best == len(leads) else float((leads[best - 1] + leads[best]) / 2)


def figures(
    exact: np.ndarray, f1s: np.ndarray, answerable: np.ndarray, second: bool, intervals: bool = True
) -> dict[str, Any]:
    """Means over the questions with 95% bootstrap intervals; for SQuAD 2.0 those with and without answers apart."""
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
