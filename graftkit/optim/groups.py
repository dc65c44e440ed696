"""From labels to optimizer parameter groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from graftkit.backbone import Backbone, select
from graftkit.backbone.walk import parameters_of
from graftkit.backbone.weights import weights_at
from graftkit.errors import UserError
from graftkit.optim.base import ParamGroup
from graftkit.optim.labels import Group


def rate(group: Group, lr: float | None) -> float:
    """Return the learning rate of a group: the method's option, else `lr`, else the method's default; scaled."""
    return (group.lr if group.fixed_lr or lr is None else lr) * group.lr_scale


def decay(group: Group, parameter: nn.Parameter, weight_decay: float) -> float:
    """Return the weight decay of a parameter: its label's, else none for vectors (norms, biases), else the run's."""
    if group.weight_decay is not None:
        return group.weight_decay
    return weight_decay if parameter.dim() > 1 else 0.0


def hidden_matrices(backbone: Backbone) -> set[str]:
    """Return the names of the weights of linear layers in the body of a model, without embeddings, head and additions.

    Optimizers with special updates for matrices, such as GaLore and Muon, are made for these.
    """
    try:
        sites = select(backbone, "all-linear")
    except UserError:  # there are none
        return set()
    weights = {id(weight.value) for site in sites for weight in weights_at(backbone, site)}
    names = backbone.base_parameters
    return {
        name
        for name, parameter in parameters_of(backbone.model).items()
        if id(parameter) in weights and parameter.dim() == 2 and name in names
    }


def param_groups(
    parameters: Mapping[str, nn.Parameter],
    labels: Mapping[str, Group],
    lr: float | None,
    weight_decay: float,
    hidden: Collection[str] = (),
    blocks: Sequence[str] = (),
) -> list[ParamGroup]:
    """Return one optimizer group for each (rate, decay, hidden); every labelled parameter lands in exactly one.

    `hidden`: names of the matrices in the network's body, for which some optimizers have special updates. `blocks`: the
    names of the backbone's blocks, in order.
    """
    groups: dict[tuple[float, float, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        label = labels[name]
        key = rate(label, lr), decay(label, parameter, weight_decay), name in hidden
        groups.setdefault(key, {})[name] = parameter
    assert sum(map(len, groups.values())) == len(labels), "a labelled parameter is missing from the groups"
    owners = {f"{block}.": number for number, block in enumerate(blocks)}
    return [
        {
            "params": list(members.values()),
            "lr": r,
            "weight_decay": d,
            "hidden": h,
            "blocks": [_block(name, owners) for name in members],
        }
        for (r, d, h), members in groups.items()
    ]


def _block(name: str, owners: Mapping[str, int]) -> int | None:
    """Return the number of the block that a parameter lies in. `owners`: numbers by the prefix of the block's names."""
    return next((number for prefix, number in owners.items() if name.startswith(prefix)), None)
