"""Why a model answered as it did: a score for each part of its input, checked by deleting the parts with the highest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.engine.forward import Forward
from graftkit.errors import UserError, listing, nearest
from graftkit.insight.attribution_gradients import gradient_x_input, integrated_gradients
from graftkit.insight.attribution_inputs import RowInput, Unfit
from graftkit.insight.attribution_maps import attention, grad_cam
from graftkit.tasks.base import Dataset, Task
from graftkit.tasks.explained import Aim

STEPS = 50  # of integrated gradients
MOST_STEPS = 1000
SHARE = 0.2  # of the parts that the check deletes
DRAWS = 20  # of as many other parts
HOLDS = 0.8  # of the draws must change the answer less
MATTERS = 0.1  # of what deleting all parts changes, which deleting the top ones must reach
CLOSE = 0.05  # error of completeness above which more steps are advised
GRADIENTS = "integrated_gradients"
METHODS: dict[str, Callable[[RowInput, int], Tensor]] = {
    "gradient_x_input": lambda row, steps: gradient_x_input(row),
    GRADIENTS: integrated_gradients,
    "grad_cam": lambda row, steps: grad_cam(row),
    "attention": lambda row, steps: attention(row),
}
OF_IMAGES = ("grad_cam", "attention", GRADIENTS)  # the first that fits is used


@dataclass(frozen=True)
class Explanation:
    """The explanation of one answer.

    `scores`: (parts,), with `signed` scores positive for what speaks for the answer; their absolute values sum to 1.
    `value`: what is explained, log-odds or a number. `completeness`: of integrated gradients. `deletion`: the check.
    """

    row: RowInput
    method: str
    scores: np.ndarray
    value: float
    completeness: dict[str, Any] | None
    deletion: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def aim(self) -> Aim:
        return self.row.aim


def check_method(method: str | None, steps: int) -> None:
    """Raise `UserError` for an unknown method or a number of steps out of range."""
    if method is not None and method not in METHODS:
        raise UserError(
            f"method {method!r} is unknown (available: {listing(METHODS)}).{nearest(method, METHODS)}"
        )
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"steps is {steps}; it must be between 1 and {MOST_STEPS:,}.")


def explain(
    forward: Forward, task: Task, dataset: Dataset, labels: tuple[str, ...], *, method: str | None = None,
    steps: int = STEPS, label: str | None = None, word: str | None = None,
) -> Explanation:  # fmt: skip
    """Explain the answer to the one example of a dataset, or why it is not another `label`.

    `method`: one of `METHODS`; None for Grad-CAM or attention on images, whichever the model allows, and integrated
    gradients otherwise. `word`: whose tag is explained. The model must be in eval mode. Raises `UserError` for a method that
    does not fit the model, an unknown label, and an unknown word.
    """

    @torch.no_grad()
    def outputs(row: int) -> Tensor:
        return forward(dataset.batch(np.array([row]), forward.device)).float()

    aim = task.aim(dataset, outputs, labels, label, word)
    row = RowInput(forward, task, dataset, aim)
    method, found = _first_fitting(row, method, steps)
    raw = row.by_part(found)
    if not np.isfinite(raw).all():
        raise UserError(
            f"{dataset.where(aim.row)}: {method} gives values that are not finite; check the model's weights."
        )
    total = np.abs(raw).sum()
    scores = raw / total if total > 0 else raw
    grades = row.aimed(row.without([(), range(len(row.parts))]))
    value, empty = (float(one) for one in grades)
    notes = (
        [f"{dataset.truncated} text was cut to the length that the model reads"] if dataset.truncated else []
    )
    completeness = None
    if method == GRADIENTS:
        completeness = _completeness(float(found.cpu().double().sum()), value - empty, steps)
        if completeness["error"] > CLOSE:
            notes.append(
                f"the scores miss {completeness['error']:.0%} of the change that they should add up to; raise steps ({steps})"
            )
    if total == 0:
        notes.append("the gradient is zero for every part, so nothing is marked")
    deletion = check_by_deletion(row, scores, value, empty)
    return Explanation(row, method, scores, value, completeness, deletion, tuple(notes))


def _first_fitting(row: RowInput, method: str | None, steps: int) -> tuple[str, Tensor]:
    if method is not None:
        return method, METHODS[method](row, steps)
    for name in OF_IMAGES if row.is_image else ():
        try:
            return name, METHODS[name](row, steps)
        except Unfit:
            continue
    return GRADIENTS, METHODS[GRADIENTS](row, steps)


def _completeness(total: float, difference: float, steps: int) -> dict[str, Any]:
    """Compare the sum of integrated gradients with the difference that it should equal."""
    error = abs(total - difference) / max(abs(difference), 1e-6)
    return {
        "sum": round(total, 6), "difference": round(difference, 6), "error": round(error, 6), "steps": steps,
    }  # fmt: skip


def check_by_deletion(row: RowInput, scores: np.ndarray, value: float, empty: float) -> dict[str, Any]:
    """Delete the parts with the highest scores, and random other ones, and compare what becomes of the answer.

    Of the parts a fifth is deleted, those of positive score; for an answer that is a number, those of the largest absolute
    score. The explanation `holds` if this changes the log-odds, or the number, by at least a tenth of what deleting all
    parts does, and more than 80% of 20 draws of as many other parts do, which are the same in every call. `value`, `empty`:
    what is explained, with all parts and with none.
    """
    odds = row.aim.odds
    weight = scores if odds else np.abs(scores)
    count = max(1, round(SHARE * len(scores)))
    top = [int(i) for i in np.argsort(-weight, kind="stable")[:count] if weight[i] > 0]
    others = [i for i in range(len(scores)) if i not in top]
    draw = np.random.default_rng(0)
    size = min(len(top), len(others))
    draws = [draw.choice(others, size, replace=False).tolist() for _ in range(DRAWS)] if size else []
    graded = row.without([top, *draws])
    values = row.aimed(graded).cpu().double()
    found = values.numpy()
    changes = value - found if odds else np.abs(value - found)
    least = MATTERS * (value - empty if odds else abs(value - empty))
    less = float((changes[1:] < changes[0]).mean()) if draws else 1.0
    after = _means(found, draws)
    shown = _means(values.sigmoid().numpy(), draws) if odds else after
    before = float(torch.tensor(value, dtype=torch.float64).sigmoid()) if odds else value
    told: dict[str, Any] = {
        "parts": len(top), "of": len(scores), "before": round(before, 4), **shown,
        **({"log_odds": {"before": round(value, 4), **after}} if odds else {}),
        "draws": len(draws), "share_of_draws_below": round(less, 4),
        "holds": bool(top and changes[0] > max(0, least) and less >= HOLDS),
    }  # fmt: skip
    if "label" in row.aim.said:
        told["best_without_top"] = int(row.task.chosen(graded[(0, *row.aim.at[:-1])]))
    return told


def _means(found: np.ndarray, draws: list[list[int]]) -> dict[str, float | None]:
    """Return the first value, without the top parts, and the mean of the others, each without random ones."""
    return {
        "without_top": round(float(found[0]), 4),
        "without_random": round(float(found[1:].mean()), 4) if draws else None,
    }
