"""Passes by formula, where a model cannot be called on fake tensors.

Activations of a block for s tokens of width d, b rows and a heads: s b d (34 + 5 a s / d) bytes in two-byte types (Korthikanti
et al. 2022, 'Reducing Activation Recomputation in Large Transformer Models', equation 1); FLOPs as in `plan.work`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from graftkit.errors import first_line
from graftkit.grafts.graft import Graft
from graftkit.plan.forecast import Load
from graftkit.plan.operations import ELEMENTWISE, PRODUCTS, Operation
from graftkit.plan.pretended import Counted
from graftkit.plan.work import flops_of

HEAD = 64  # width of an attention head
CALLS = 150  # operations of a block, forward and backward


def estimated(
    graft: Graft, depth: int, precision: str, batches: Sequence[tuple[int, int]], reason: Exception
) -> Load:  # fmt: skip
    """Return the load of batches of (rows, length), the heaviest first."""
    note = f"memory and time are estimated from shapes alone, as the model cannot be called without numbers ({type(reason).__name__}: {first_line(reason)[:120]})"
    passes = [
        _pass(graft, depth, precision, rows, length)
        for rows, length in (batches[0], batches[len(batches) // 2])
    ]
    return Load(passes[0], [(1.0, passes[1])], None, None, exact=False, note=note)


def _pass(graft: Graft, depth: int, precision: str, rows: int, length: int) -> Counted:
    width = int(getattr(getattr(graft.model, "config", None), "hidden_size", 0) or 256)
    blocks = max(1, len(graft.backbone.blocks) - depth)
    factor = 1 if precision != "fp32" else 2
    tokens = rows * length
    saved = int(factor * tokens * width * (34 + 5 * length / HEAD) * blocks)
    trained = 4 * sum(p.numel() for p in graft.parameters.values())
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    flops = flops_of(graft, depth, np.full(rows, length), 0.0)
    operations = Counter({
        Operation(PRODUCTS, "mm", dtype, (1, tokens, width, width), flops, 0.0): 1,
        Operation(ELEMENTWISE, "add", dtype, (tokens * width,), 0.0, 4.0 * saved): 1,
        Operation("view", "calls", dtype, (), 0.0, 0.0): CALLS * blocks,
    })  # fmt: skip
    return Counted(saved + trained, saved, operations, saved + trained, 0)
