"""Several rows in one: which go together, and whether a model keeps them apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graftkit.backbone.memory import is_out_of_memory
from graftkit.backbone.prompts import positions_taken
from graftkit.data.ragged import places
from graftkit.errors import first_line

# largest difference of a logit between packed and separate rows, as a share of the largest logit
SAME, SAME_BF16 = 1e-3, 3e-2


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Row numbers of each packed row of at most `room` tokens: the longest first, each where it fits best."""
    packed: list[list[int]] = []
    left: list[tuple[int, int]] = []  # room left and number of each packed row, sorted
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = bisect_left(left, (lengths[row], -1))
        if place == len(left):
            packed.append([row])
            rest, number = room - lengths[row], len(packed) - 1
        else:
            rest, number = left.pop(place)
            packed[number].append(row)
            rest -= lengths[row]
        if rest > 0:
            insort(left, (rest, number))
    return packed


def positions(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Positions within each of several rows that stand behind one another: 0, 1, 2, 0, 1, ..."""
    sizes = np.asarray(lengths, dtype=np.int64)
    return places(np.zeros_like(sizes), sizes)


@torch.no_grad()
def leaks(model: Any, rows: Sequence[np.ndarray]) -> str | None:
    """Why rows of this model cannot be packed, found by trying it on some; None where it keeps them apart.

    Models of transformers 5 see from positions that begin anew where the next row begins, and let no token attend
    across (`masking_utils.find_packed_sequence_indices`). Recurrent models, and those whose positions come from the
    attention mask, cannot.
    """
    if positions_taken(model):
        return (
            "virtual tokens stand in front of a row once, so only the first of the packed ones would see them"
        )
    rows = [row[:16] for row in sorted(rows, key=len)[-3:] if len(row)]
    if len(rows) < 2:
        return None
    training = model.training
    device = next(model.parameters()).device

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64))[None].to(device)

    half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            joined = model(
                input_ids=tensor(np.concatenate(rows)), position_ids=tensor(positions([len(row) for row in rows])),
                use_cache=False,
            ).logits[0]  # fmt: skip
            alone = torch.cat([model(input_ids=tensor(row), use_cache=False).logits[0] for row in rows])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        return f"it takes no positions that begin anew ({first_line(error)})"
    finally:
        model.train(training)
    difference = float((joined - alone).abs().max() / alone.abs().max().clamp(min=1e-9))
    if not difference < (SAME_BF16 if half else SAME):
        return f"its logits for packed rows differ from those of the rows alone by {difference:.2g} of the largest one"
    return None
