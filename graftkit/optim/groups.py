"""From labels to optimizer parameter groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graftkit.optim.labels import Group, Projection
from graftkit.optim.projected import ProjectedAdamW


def rate(group: Group, lr: float | None) -> float:
    """Learning rate of a group: what the method's option says, else `lr`, else the method's default; scaled."""
    return (group.lr if group.fixed_lr or lr is None else lr) * group.lr_scale


def decay(group: Group, parameter: nn.Parameter, weight_decay: float) -> float:
    """Weight decay of a parameter: its label's, else none for vectors (norms, biases), else the run's."""
    if group.weight_decay is not None:
        return group.weight_decay
    return weight_decay if parameter.dim() > 1 else 0.0


def param_groups(
    parameters: Mapping[str, nn.Parameter], labels: Mapping[str, Group], lr: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """One optimizer group for each (rate, decay, projection); every labelled parameter lands in exactly one."""
    groups: dict[tuple[float, float, Projection | None], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        label = labels[name]
        key = rate(label, lr), decay(label, parameter, weight_decay), label.projection
        groups.setdefault(key, []).append(parameter)
    assert sum(map(len, groups.values())) == len(labels), "a labelled parameter is missing from the groups"
    return [
        {
            "params": members,
            "lr": r,
            "weight_decay": d,
            **({} if p is None else {"projection": dataclasses.asdict(p)}),
        }
        for (r, d, p), members in groups.items()
    ]


def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW over the groups of `param_groups`, fused where it can be; in low rank where one has a projection."""
    fused = {p.device.type for group in groups for p in group["params"]} <= {"cpu", "cuda"}
    projects = any("projection" in group for group in groups)
    return (ProjectedAdamW if projects else torch.optim.AdamW)(groups or [{"params": []}], fused=fused)


def state_numbers(parameter: nn.Parameter, group: Group) -> int:
    """How many numbers that optimizer keeps of a parameter, but for its count of steps."""
    if group.projection is None:
        return 2 * parameter.numel()
    short, long = sorted(parameter.shape)
    return (short + 2 * long) * group.projection.rank
