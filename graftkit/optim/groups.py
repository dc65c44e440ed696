"""From labels to optimizer parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from graftkit.methods.base import Group


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
    """One optimizer group for each (rate, decay); every labelled parameter lands in exactly one."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        key = rate(labels[name], lr), decay(labels[name], parameter, weight_decay)
        groups.setdefault(key, []).append(parameter)
    assert sum(map(len, groups.values())) == len(labels), "a labelled parameter is missing from the groups"
    return [{"params": members, "lr": r, "weight_decay": d} for (r, d), members in groups.items()]
