"""How sure a model is: calibrated probabilities, and sets of labels that hold the right one with a wanted probability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from graftkit.errors import UserError
from graftkit.insight.confidence_evidence import Evidence
from graftkit.insight.confidence_known import Known
from graftkit.tasks.shared.metrics import calibration, log_softmax

FEW = 20  # answers; with fewer, no temperature is fitted, and nothing is told to be unknown
LARGEST = 20.0  # temperature, and its inverse


@dataclass(frozen=True)
class Confidence:
    """What was fitted on evaluation rows.

    `temperature`: logits are divided by it. `rows`: number of answers it was fitted on. `before` and `after`: expected
    calibration error on these, without and with it. `scores`: sorted 1 - p of the right labels, for sets of labels; None
    for tasks without them. `known`: tells rows that are like none of the labels; None if that is impossible, and `note`
    says why.
    """

    temperature: float
    rows: int
    before: float
    after: float
    scores: np.ndarray | None = None
    known: Known | None = None
    note: str = ""


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the temperature that minimises the negative log-likelihood of logits / temperature (Guo et al. 2017, "On
    Calibration of Modern Neural Networks", section 4.2).

    `logits` (n, labels); `targets` (n,) label numbers, or (n, labels) of 0 and 1 for independent labels, which share the
    temperature. As in Platt scaling (Platt 1999), a target of 1 counts as 1 - 1 / (n + 2): otherwise the temperature of
    rows that are all answered correctly would be 0. The likelihood is concave in 1 / temperature.
    """
    from scipy.optimize import minimize_scalar

    n = len(logits)
    rest = 1 / (n + 2)
    values = logits.astype(np.float32)
    if targets.ndim == 1:
        values = values - values.max(1, keepdims=True)
        aimed = (1 - rest) * values[np.arange(n), targets] + rest * values.mean(1)

        def loss(log: float) -> float:
            scaled = values * np.float32(math.exp(-log))
            return float((np.log(np.exp(scaled).sum(1, dtype=np.float64)) - math.exp(-log) * aimed).mean())
    else:
        wanted = ((1 - rest) * targets + rest / 2).astype(np.float32)

        def loss(log: float) -> float:
            scaled = values * np.float32(math.exp(-log))
            return float((np.logaddexp(0, scaled) - scaled * wanted).mean(dtype=np.float64))

    bound = math.log(LARGEST)
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-4})
    return float(np.float32(math.exp(found.x)))


def probabilities_of(logits: np.ndarray, independent: bool, temperature: float = 1.0) -> np.ndarray:
    """Return the probabilities of labels, (n, labels) in fp64. `independent`: any number of them may be right."""
    scaled = logits.astype(np.float64) / temperature
    return 1 / (1 + np.exp(-scaled)) if independent else np.exp(log_softmax(scaled))


def calibration_error(evidence: Evidence, temperature: float = 1.0) -> float:
    """Return the expected calibration error of the most likely label, or of the probabilities of all labels where any
    number of them may be right, over ten bins."""
    logits = evidence.logits / np.float32(temperature)
    if evidence.targets.ndim == 1:
        log_probs = log_softmax(logits)
        return calibration(np.exp(log_probs.max(1)), log_probs.argmax(1) == evidence.targets)["error"]
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return calibration(probabilities.ravel(), evidence.targets.ravel() > 0)["error"]


def fit(evidence: Evidence, sets: bool, known: Known | None = None, note: str = "") -> Confidence:
    """Return the confidence fitted on rows. `sets`: keep scores for sets of labels.

    Raises `UserError` for logits that are not finite.
    """
    logits, targets = evidence.logits, evidence.targets
    if not np.isfinite(logits).all():
        raise UserError(
            "the model gives outputs that are not finite for some rows, so nothing can be fitted on them."
        )
    temperature = fit_temperature(logits, targets) if len(logits) >= FEW else 1.0
    before, after = calibration_error(evidence), calibration_error(evidence, temperature)
    scores = np.sort(scores_of(logits, targets, temperature)).astype(np.float32) if sets else None
    return Confidence(temperature, len(logits), before, after, scores, known, note)


def scores_of(logits: np.ndarray, targets: np.ndarray, temperature: float) -> np.ndarray:
    """Return 1 - p of the right label of each row, (n,), in fp64."""
    probabilities = np.exp(log_softmax(logits.astype(np.float64) / temperature))
    return 1 - probabilities[np.arange(len(targets)), targets]


def check_coverage(coverage: float) -> None:
    """Raise `UserError` unless a coverage is above 0 and below 1."""
    if isinstance(coverage, bool) or not isinstance(coverage, int | float) or not 0 < coverage < 1:
        raise UserError(
            f"coverage is {coverage!r}, but must be above 0 and below 1, such as 0.95: only the set of all labels is sure "
            "to hold the right one."
        )


def limit_of(scores: np.ndarray, coverage: float, run: str = "RUN") -> float:
    """Return the largest 1 - p of labels in a set: the ceil((n + 1) coverage)-th smallest of n sorted scores (Vovk et al.
    2005; Sadinle, Lei and Wasserman 2019, "Least Ambiguous Set-Valued Classifiers With Bounded Error Levels").

    Raises `UserError` if there are too few scores for this coverage.
    """
    check_coverage(coverage)
    place = math.ceil(round((len(scores) + 1) * coverage, 9))
    if place > len(scores):
        needed = math.ceil(round(coverage / (1 - coverage), 9))
        raise UserError(
            f"a coverage of {coverage:g} needs at least {needed:,} evaluation rows, but {len(scores):,} were calibrated on; "
            f"lower the coverage, or calibrate on a file with more rows: graftkit calibrate {run} --data FILE."
        )
    return float(scores[place - 1])


def sets_of(logits: np.ndarray, temperature: float, limit: float) -> list[list[int]]:
    """Return the labels of each row with 1 - p of at most `limit`, the most likely first; never none.

    `logits` (rows, labels).
    """
    far = 1 - np.exp(log_softmax(logits.astype(np.float64) / temperature))
    order = np.argsort(far, axis=1, kind="stable")
    counts = np.maximum(1, (far.astype(np.float32) <= np.float32(limit)).sum(1))
    return [row[:count].tolist() for row, count in zip(order, counts)]
