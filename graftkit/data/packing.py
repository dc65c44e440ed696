"""Pack several rows into one, and check that a model keeps packed rows apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graftkit.backbone.memory import is_out_of_memory
from graftkit.backbone.packed import Parts, packed
from graftkit.backbone.prompts import positions_taken
from graftkit.data.ragged import places
from graftkit.errors import first_line

# largest difference between logits of packed and separate rows, relative to the largest logit
SAME, SAME_BF16 = 1e-3, 3e-2


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return the row numbers of each packed row of at most `room` tokens, by best-fit decreasing bin packing."""
    packed: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room left, number) of each packed row, sorted
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
    """Return the positions within each of several concatenated rows: 0, 1, 2, 0, 1, ..."""
    sizes = np.asarray(lengths, dtype=np.int64)
    return places(np.zeros_like(sizes), sizes)


@torch.no_grad()
def leaks(model: Any, rows: Sequence[np.ndarray]) -> str | None:
    """Return why rows cannot be packed for this model, tested on up to 3 of `rows`; None if the model keeps them apart.

    Models of transformers 5 detect a new row where positions restart, and mask attention across rows
    (`masking_utils.find_packed_sequence_indices`). Recurrent models, and those that derive positions from the attention
    mask, do not.
    """
    if positions_taken(model):
        return "virtual tokens are added once per packed row, so only the first of its rows would see them"
    rows = [row[:16] for row in sorted(rows, key=len)[-3:] if len(row)]
    if len(rows) < 2:
        return None
    training = model.training
    device = next(model.parameters()).device

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64))[None].to(device)

    sizes = [[len(row) for row in rows]]
    half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            with packed(Parts(sizes)):
                joined = model(
                    input_ids=tensor(np.concatenate(rows)), position_ids=tensor(positions(sizes[0])),
                    use_cache=False,
                ).logits[0]  # fmt: skip
            alone = torch.cat([model(input_ids=tensor(row), use_cache=False).logits[0] for row in rows])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        return f"it does not accept positions that restart ({first_line(error)})"
    finally:
        model.train(training)
    difference = float((joined - alone).abs().max() / alone.abs().max().clamp(min=1e-9))
    if not difference < (SAME_BF16 if half else SAME):
        return f"its logits for packed and separate rows differ by {difference:.2g} of the largest one"
    return None
