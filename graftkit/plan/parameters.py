"""The cost of a run, counted from labels and shapes before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graftkit.backbone.walk import buffers_of, parameters_of
from graftkit.engine.fp8 import copies_bytes
from graftkit.engine.frozen import Phase
from graftkit.engine.precision import full_precision_names
from graftkit.grafts.fold import why_not
from graftkit.grafts.graft import Graft
from graftkit.methods.shared.advice import covering, selecting
from graftkit.optim.base import Optimizer
from graftkit.plan.memory import gradient_bytes, optimizer_bytes


@dataclass(frozen=True)
class Plan:
    """Exact counts of one run; bytes include all tensors that stay for the whole run, but no activations.

    `gradient_bytes`: the most that exist at once, with train.step_in_backward those of about one layer.
    `ema_bytes`: the averages of the trained parameters, with train.ema.
    `schedule`: if a method unfreezes parameters gradually, how many are trained from which 1-based step on;
    `never_trained_parameters` are those that the run ends too early to unfreeze. `trained_parameters` includes these.
    `batch_tokens`: with train.batch_tokens, the most tokens of a step; `batch_size` are then its rows on average.
    `lr`: train.lr, a number, 'find' or None for the methods' defaults.
    `forecast`: memory, seconds and FLOPs, where they were asked for (`plan.forecast`).
    `warnings` concern methods that add more parameters than the modules they adapt, and grafts that cannot be exported.
    """

    method: str
    optimizer: str
    trained_parameters: int
    total_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int
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
    warnings: list[str] = field(default_factory=list)
    lr: float | str | None = None
    forecast: dict[str, Any] = field(default_factory=dict)
    batch_tokens: int | None = None

    def as_dict(self) -> dict:
        """Return all fields, those of the forecast among them; a run stores none of these, as they are not exact."""
        values = dataclasses.asdict(self)
        return values | values.pop("forecast")


def make_plan(graft: Graft, optimizer: Optimizer, *, rows: int, batch_size: int, steps_per_epoch: int, steps: int, precision: str,
              frozen_blocks: int, phases: Sequence[Phase] = (), step_in_backward: bool = False, ema: bool = False,
              rounded: Collection[str] = (), accumulate: int = 1, lr: float | str | None = None,
              batch_tokens: int | None = None) -> Plan:  # fmt: skip
    """Count parameters and bytes of a graft, on real weights or on the `meta` device.

    Frozen floating-point parameters are stored in the compute type, trained ones in fp32, or bf16 if in `rounded`.
    """
    frozen_size = 4 if precision == "fp32" else 2
    trained = total = weights = 0
    groups: dict[str, int] = {}
    full = full_precision_names(graft.model, graft.labels, rounded)
    for name, parameter in parameters_of(graft.model).items():
        count = parameter.numel()
        total += 2 * count if parameter.dtype == torch.uint8 else count  # two numbers of NF4 in a byte
        if name in graft.labels:
            trained += count
            role = graft.labels[name].method
            groups[role] = groups.get(role, 0) + count
        held = 4 if name in full else frozen_size
        weights += count * (held if parameter.dtype.is_floating_point else parameter.element_size())
    if precision == "fp8":
        weights += copies_bytes(graft.backbone, graft.labels)
    weights += sum(buffer.numel() * buffer.element_size() for buffer in buffers_of(graft.model).values())
    schedule = [
        {"step": phase.start + 1, "trained_parameters": _count(graft, phase), "frozen_blocks": phase.depth}
        for phase in phases
    ]
    last = phases[-1].labels if phases else graft.labels
    if batch_tokens is not None:
        batch_size, batch_tokens = round(rows / max(1, steps_per_epoch)), batch_tokens * accumulate
    gradients = gradient_bytes(
        graft, last, step_in_backward=step_in_backward, rounded=rounded, accumulating=optimizer if accumulate > 1 else None
    )  # fmt: skip
    reached = schedule[-1]["trained_parameters"] if schedule else trained
    return Plan(
        str(graft.method), str(optimizer), trained, total, weights,
        gradients, optimizer_bytes(graft, optimizer, last),
        4 * trained if ema else 0, rows, batch_size, steps_per_epoch, steps, precision, frozen_blocks, len(graft.backbone.blocks), groups,
        schedule if len(schedule) > 1 or reached < trained else [], trained - reached,
        [*_oversized(graft), *_unexportable(graft)], lr, batch_tokens=batch_tokens,
    )  # fmt: skip


def _unexportable(graft: Graft) -> list[str]:
    reason = why_not(graft)
    return [] if reason is None else [f"this graft cannot be exported as a plain model: {reason}"]


def _oversized(graft: Graft) -> list[str]:
    """Warn of methods that add more parameters than the modules at their sites, or the backbone, have."""
    added: dict[str, dict[str, int]] = {}  # method -> name of the module -> parameters
    for addition, module in graft.additions():
        for name, parameter in module.named_parameters(prefix=addition):
            group = graft.labels.get(name)
            if group is not None and group.role == "added":
                at = added.setdefault(group.method, {})
                site = addition.rpartition(".")[0]
                at[site] = at.get(site, 0) + parameter.numel()
    sizes = {name: parameter.numel() for name, parameter in parameters_of(graft.model).items()}
    own: dict[str, int] = {}
    for name in graft.backbone.base_parameters:
        owner = name.rpartition(".")[0]
        own[owner] = own.get(owner, 0) + sizes.get(name, 0)
    found = []
    for method, at in added.items():
        total, base = sum(at.values()), sum(own.values())
        if total > base:
            found.append(
                f"{method}() adds {total:,} parameters, more than the {base:,} of the whole backbone; reduce its size, or "
                f"use {covering()}, which trains fewer"
            )
            continue
        large = {site: count for site, count in at.items() if 0 < own.get(site, 0) < count}
        if large:
            site = next(iter(large))
            found.append(
                f"{method}() adds more parameters than the module itself has at {len(large):,} of {len(at):,} modules, "
                f"such as {large[site]:,} next to the {own[site]:,} of {site!r}; reduce its size, or use {selecting()} there, "
                "which trains fewer"
            )
    return found


def _count(graft: Graft, phase: Phase) -> int:
    return sum(p.numel() for name, p in graft.parameters.items() if name in phase.labels)
