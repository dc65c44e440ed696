"""What a run will cost, counted from labels and shapes before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from graftkit.engine.frozen import Phase
from graftkit.engine.precision import full_precision_names
from graftkit.graft import Graft

OPTIMIZER_TENSORS = 2  # AdamW keeps two moments of each trained parameter, in fp32


@dataclass(frozen=True)
class Plan:
    """Exact counts of one run; bytes are of tensors that stay for the whole run, without activations.

    `schedule`: where a method frees parameters one after another, how many are trained from which step on (from 1);
    `never_trained_parameters` are those for which the run ends too early. `trained_parameters` counts these too.
    """

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
    schedule: list[dict[str, int]] = field(default_factory=list)
    never_trained_parameters: int = 0

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def make_plan(graft: Graft, *, rows: int, batch_size: int, steps_per_epoch: int, steps: int, precision: str,
              frozen_blocks: int, phases: Sequence[Phase] = ()) -> Plan:  # fmt: skip
    """Count parameters and bytes of a graft, on real weights or on the `meta` device alike.

    Frozen floating-point parameters are held in the compute type, trained ones and all buffers as they are used.
    """
    frozen_size = 2 if precision == "bf16" else 4
    trained = total = weights = 0
    groups: dict[str, int] = {}
    full = full_precision_names(graft.model, graft.labels)
    for name, parameter in graft.model.named_parameters():
        count = parameter.numel()
        total += 2 * count if parameter.dtype == torch.uint8 else count  # two numbers of NF4 in a byte
        if name in graft.labels:
            trained += count
            role = graft.labels[name].method
            groups[role] = groups.get(role, 0) + count
        held = 4 if name in full else frozen_size
        weights += count * (held if parameter.dtype.is_floating_point else parameter.element_size())
    weights += sum(buffer.numel() * buffer.element_size() for buffer in graft.model.buffers())
    schedule = [
        {"step": phase.start + 1, "trained_parameters": _count(graft, phase), "frozen_blocks": phase.depth}
        for phase in phases
    ]
    reached = schedule[-1]["trained_parameters"] if schedule else trained
    return Plan(
        str(graft.method), trained, total, weights, 4 * reached, 4 * OPTIMIZER_TENSORS * reached, rows, batch_size,
        steps_per_epoch, steps, precision, frozen_blocks, len(graft.backbone.blocks), groups,
        schedule if len(schedule) > 1 or reached < trained else [], trained - reached,
    )  # fmt: skip


def _count(graft: Graft, phase: Phase) -> int:
    return sum(p.numel() for name, p in graft.parameters.items() if name in phase.labels)
