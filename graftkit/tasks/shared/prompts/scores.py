"""Log-probabilities of words after a prompt, in place of a mask, or in a blank, in few forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone.calls import parameters_of
from graftkit.data.ragged import Ragged, mask

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prompt:
    """Token ids of the prompt of a row. For a masked model: one sequence for each word length, with as many masks, and the
    position of its first mask; for a GLM one with a single mask; for a causal model one sequence, which the words follow."""

    ids: dict[int, np.ndarray]
    places: dict[int, int]
    shots: int  # examples in it
    cut: bool  # something of the row's own texts is missing

    @property
    def length(self) -> int:
        return max(map(len, self.ids.values()))


def causal_scores(
    model: nn.Module,
    prompts: Sequence[Prompt],
    words: Sequence[Sequence[int]],
    pad: int,
    move: Move,
    opening: int | None = None,
) -> Tensor:
    """Return the sum over the tokens of each word of log p(token | prompt, tokens before it), (rows, words), in fp32.

    `opening`: the token that begins a blank of a GLM, which writes the words behind the prompt, at the place of its mask.
    Needs one pass for each word prefix (all tokens but the last) that is not part of a longer one: a single pass if all
    words are single tokens.
    """
    starts = sorted({tuple(word[:-1]) for word in words}, key=len, reverse=True)
    passes = [s for i, s in enumerate(starts) if not any(t[: len(s)] == s for t in starts[:i])]
    first = [] if opening is None else [opening]
    given = [np.concatenate([*prompt.ids.values(), first]) for prompt in prompts]
    scores: dict[int, Tensor] = {}
    for start in passes:
        rows = [np.concatenate([ids, start]).astype(np.int64) for ids in given]
        at = np.array([[len(ids) - 1 + i for i in range(len(start) + 1)] for ids in given])
        inputs = padded(rows, pad)
        if opening is not None:
            inputs |= _blank_positions(model, prompts, inputs["input_ids"].shape[1])
        logs = _logs(model, _moved(inputs, move), at)
        for number, word in enumerate(words):
            if number not in scores and tuple(word[:-1]) == start[: len(word) - 1]:
                picked = [logs[:, i, token] for i, token in enumerate(word)]
                scores[number] = torch.stack(picked, dim=1).sum(dim=1)
    return torch.stack([scores[number] for number in range(len(words))], dim=1)


def _blank_positions(model: Any, prompts: Sequence[Prompt], length: int) -> dict[str, Tensor]:
    """Return both positions of a GLM's inputs, (rows, length), for one blank behind each prompt."""
    sizes = np.array([[prompt.length] for prompt in prompts])
    places = np.array([[place] for prompt in prompts for place in prompt.places.values()])
    order = np.arange(length)[None].repeat(len(prompts), axis=0)
    found = {"block_position_ids": np.maximum(0, order - sizes + 1)}
    if model.config.block_positions:
        found["position_ids"] = np.where(order < sizes, order, places)
    return {name: torch.from_numpy(array) for name, array in found.items()}


def masked_scores(
    model: nn.Module, prompts: Sequence[Prompt], words: Sequence[Sequence[int]], pad: int, move: Move
) -> Tensor:
    """Return the sum over the tokens of each word of log p(token | its mask), (rows, words), in fp32. A word of several
    tokens has as many masks, predicted in parallel. Needs one pass for each word length."""
    scores: dict[int, Tensor] = {}
    for length in sorted({len(word) for word in words}):
        rows = [prompt.ids[length] for prompt in prompts]
        at = np.array([[prompt.places[length] + i for i in range(length)] for prompt in prompts])
        logs = _logs(model, _moved(padded(rows, pad), move), at)
        for number, word in enumerate(words):
            if len(word) == length:
                picked = [logs[:, i, token] for i, token in enumerate(word)]
                scores[number] = torch.stack(picked, dim=1).sum(dim=1)
    return torch.stack([scores[number] for number in range(len(words))], dim=1)


def _moved(inputs: dict[str, Tensor], move: Move) -> dict[str, Tensor]:
    return {name: move(tensor) for name, tensor in inputs.items()}


def padded(rows: Sequence[np.ndarray], pad: int) -> dict[str, Tensor]:
    """Return rows padded on the right, and their mask."""
    given = Ragged(rows)
    ids = given.padded(np.arange(len(rows)), pad)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask(given.lengths))}


def _logs(model: nn.Module, inputs: dict[str, Tensor], at: np.ndarray) -> Tensor:
    """Return log p of all tokens at positions `at` (rows, places) of each row, (rows, places, vocabulary), in fp32.

    Models that support it skip all other positions, whose logits take most of the memory for a large vocabulary.
    """
    device, more = inputs["input_ids"].device, {}
    if "logits_to_keep" in parameters_of(model):
        kept, inverse = np.unique(at, return_inverse=True)  # here, as a device would have to be waited for
        at, more["logits_to_keep"] = inverse.reshape(at.shape), torch.from_numpy(kept).to(device)
    output: Any = model(**inputs, **more)
    logits = output if isinstance(output, Tensor) else output.logits
    places = torch.from_numpy(at).to(device)
    rows = torch.arange(len(places), device=device).unsqueeze(1)
    return logits[rows, places].float().log_softmax(dim=-1)
