"""How each parameter is trained: the labels that methods give to the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Group:
    """How one parameter is trained.

    `role`: 'added' (a method's new parameters), 'base' (the backbone's own) or 'head'.
    `lr`: the method's learning rate; `fixed_lr`: the user wrote it, so `train.lr` does not replace it.
    `lr_scale`: factor on it (layerwise_lr). `weight_decay`: None means the run's; 0.0 for none.
    `statistics`: the running statistics beside this parameter (BatchNorm's mean and variance) are updated as well.
    """

    role: str
    lr: float
    method: str
    fixed_lr: bool = False
    lr_scale: float = 1.0
    weight_decay: float | None = None
    statistics: bool = False


Labels = dict[str, Group]


def scaled(labels: Labels, factor: float) -> Labels:
    """Return labels whose learning rates are multiplied by a factor."""
    return {name: replace(group, lr_scale=group.lr_scale * factor) for name, group in labels.items()}
