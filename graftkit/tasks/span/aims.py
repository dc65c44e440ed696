"""Explain the span that answers a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.tasks.explained import Aim, Cut, log_odds
from graftkit.tasks.shared.texts import words_of
from graftkit.tasks.span.windows import Found, Windows


def odds_of_spans(outputs: Tensor) -> Tensor:
    """Return the log-odds of each span, (rows, length, length) by first and last token, given start and end logits
    (rows, length, 2). The probability of a span is the product of those of its ends."""
    logs = outputs.transpose(1, 2).log_softmax(-1)
    without = logs - log_odds(logs)  # log(1 - p) of each end
    start, end = logs[:, 0, :, None], logs[:, 1, None, :]
    no_start, no_end = without[:, 0, :, None], without[:, 1, None, :]
    return start + end - torch.logaddexp(no_start.expand(-1, -1, end.shape[-1]), start + no_end)


def aim_at_span(dataset: Windows, found: Sequence[Found], answer: dict[str, Any]) -> Aim:
    """Aim at an answer to the one question of a dataset, in the window that scores it best; `found`: of each window."""
    if answer["start"] is None:
        row = min(range(len(found)), key=lambda i: found[i].null)
        place = dataset.windows[row].null
        return Aim(row, (place, place), {"answer": ""})
    best: tuple[float, int, tuple[int, int]] | None = None
    for row, (window, one) in enumerate(zip(dataset.windows, found)):
        places = window.tokens_of(answer["answer"], answer["start"], (True, True))
        score = max(
            (s for s, a, b in one.spans if a <= answer["start"] and b >= answer["end"]), default=-np.inf
        )
        if places is not None and (best is None or score > best[0]):
            best = score, row, places
    assert best is not None
    return Aim(best[1], best[2], {name: answer[name] for name in ("answer", "start", "end")})


def cut_window(dataset: Windows, row: int, tokenizer: Any) -> Cut:
    """Divide a window into the words of the question and of its piece of the context."""
    window, values = dataset.windows[row], dataset.examples.values
    texts = {name: values[name][window.question] for name in ("question", "context")}
    ids = window.features["input_ids"].tolist()
    sequences: list[int | None] = [None] * len(ids)
    offsets = [(0, 0)] * len(ids)
    for place, (a, b) in enumerate(window.offsets.tolist(), window.first):
        sequences[place], offsets[place] = 1, (a, b)
    asked = tokenizer(texts["question"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    size = len(asked["input_ids"])
    at = next((i for i in range(len(ids) - size + 1) if ids[i : i + size] == asked["input_ids"]), None)
    if at is not None:
        sequences[at : at + size], offsets[at : at + size] = [0] * size, asked["offset_mapping"]
    return words_of(texts, sequences, offsets)
