"""LogME: the evidence of a linear model on features, a score of transferability that needs no held-out rows."""

from __future__ import annotations

import numpy as np

STEPS = 50  # of the fixed point at most; two or three are usual
CLOSE = 1e-4  # relative change of alpha / beta that ends it
NOISE = 1e-12  # smaller eigenvalues, relative to the largest, are rounding


def logme(features: np.ndarray, table: np.ndarray) -> float:
    """Return the logarithm of the maximum evidence, divided by the number of rows, and its mean over the columns of targets.

    For targets y (rows,) and features F (rows, width), the evidence is p(y | F) under y = F w + noise with w ~ N(0, 1/alpha)
    and noise ~ N(0, 1/beta), at its maximum over alpha and beta. You et al. 2021, "LogME: Practical Assessment of Pre-trained
    Models for Transfer Learning", equation 2 and algorithm 1. It depends on the scale of the targets, and not on that of the
    features; `table` (rows, columns) has a column of 0 and 1 for each class, or the numbers of a regression.
    """
    rows, width = features.shape
    features, answers = features.astype(np.float64), table.astype(np.float64)
    squares, vectors = np.linalg.eigh(features @ features.T if rows < width else features.T @ features)
    kept = squares > NOISE * max(float(squares[-1]), 1e-300)  # squared singular values
    squares, vectors = squares[kept, None], vectors[:, kept]
    inside = (vectors.T @ (answers if rows < width else features.T @ answers)) ** 2
    if rows >= width:
        inside /= squares  # (kept, columns), of the targets along the left singular vectors
    outside = np.maximum((answers**2).sum(0) - inside.sum(0), 0.0)  # of which no features tell
    alpha, beta = np.ones(answers.shape[1]), np.ones(answers.shape[1])
    tiny = 1e-10 * np.maximum((answers**2).sum(0), 1e-300)  # of a column that features tell without any error

    for _ in range(STEPS):
        ratio = alpha / beta
        used = (squares / (squares + ratio)).sum(0)
        weights = (inside * squares / (squares + ratio) ** 2).sum(0)
        errors = np.maximum((inside * (ratio / (squares + ratio)) ** 2).sum(0) + outside, tiny)
        alpha = used / np.maximum(weights, 1e-300)
        beta = np.maximum(rows - used, 1e-6) / errors
        if np.all(np.abs(alpha / beta - ratio) <= CLOSE * ratio):
            break
    ratio = alpha / beta
    weights = (inside * squares / (squares + ratio) ** 2).sum(0)
    errors = np.maximum((inside * (ratio / (squares + ratio)) ** 2).sum(0) + outside, tiny)
    evidence = (
        rows / 2 * np.log(beta / (2 * np.pi)) + width / 2 * np.log(alpha) - beta / 2 * errors - alpha / 2 * weights
        - np.log(alpha + beta * squares).sum(0) / 2 - (width - len(squares)) / 2 * np.log(alpha)
    )  # fmt: skip
    return float((evidence / rows).mean())
