"""What a run will cost, counted from labels and shapes before the first step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from graftkit.engine.precision import full_precision_names
from graftkit.graft import Graft

OPTIMIZER_TENSORS = 2  # AdamW keeps two moments of each trained parameter, in fp32


@dataclass(frozen=True)
class Plan:
    """Exact counts of one run; bytes are of tensors that stay for the whole run, without activations."""

    method: str
    trained_parameters: int
    total_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    rows: int
    batch_size: int
    steps_per_epoch: int
    steps: int
    precision: str
    frozen_blocks: int
    blocks: int
    groups: dict[str, int]

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def make_plan(graft: Graft, *, rows: int, batch_size: int, steps_per_epoch: int, steps: int, precision: str,
              frozen_blocks: int) -> Plan:  # fmt: skip
    """Count parameters and bytes of a graft, on real weights or on the `meta` device alike.

    Frozen floating-point parameters are held in the compute type, trained ones and all buffers as they are used.
    """
    frozen_size = 2 if precision == "bf16" else 4
    trained = total = weights = 0
    groups: dict[str, int] = {}
    full = full_precision_names(graft.model, graft.labels)
    for name, parameter in graft.model.named_parameters():
        count = parameter.numel()
        total += count
        if name in graft.labels:
            trained += count
            role = graft.labels[name].method
            groups[role] = groups.get(role, 0) + count
        held = 4 if name in full else frozen_size
        weights += count * (held if parameter.dtype.is_floating_point else parameter.element_size())
    weights += sum(buffer.numel() * buffer.element_size() for buffer in graft.model.buffers())
    return Plan(
        str(graft.method), trained, total, weights, 4 * trained, 4 * OPTIMIZER_TENSORS * trained, rows, batch_size,
        steps_per_epoch, steps, precision, frozen_blocks, len(graft.backbone.blocks), groups,
    )  # fmt: skip
