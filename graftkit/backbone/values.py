"""Whether a backbone has the weights that a graft was trained on, by a few of its values."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from graftkit.backbone.backbone import Backbone
from graftkit.backbone.walk import parameters_of
from graftkit.errors import listing

KEY = "base_values"  # in graft.json and plan.json
PARAMETERS, VALUES = 16, 8  # how many parameters are looked at, and how many values of each
RELATIVE, ABSOLUTE = (
    2**-8,
    1e-7,
)  # what a cast to bfloat16 or float16 changes at most, and more than that is another value


class OtherWeights(UserWarning):
    """A backbone has the names and shapes of the one that a graft was trained on, and other values."""


def sampled(backbone: Backbone, trained: Collection[str]) -> dict[str, list[float]]:
    """A few values of some frozen parameters, spread over the model: at most 128 numbers, read at once.

    Left out are parameters in `trained`, the head, what the weights lack, and what is stored as integers. Empty on the
    meta device.
    """
    head = {site.name for site in backbone.sites if site.role == "head"}
    left_out = {*trained, *backbone.missing}
    present = parameters_of(backbone.model)
    names = [
        name for name in sorted(backbone.base_parameters)
        if name not in left_out and name.rpartition(".")[0] not in head and name in present
        and present[name].dtype.is_floating_point and present[name].numel() and not present[name].is_meta
    ]  # fmt: skip
    return _values(present, [names[i] for i in _spread(len(names), PARAMETERS)])


def _values(present: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, list[float]]:
    with torch.no_grad():
        picked = [present[name].detach().reshape(-1) for name in names]
        picked = [
            flat[torch.tensor(_spread(len(flat), VALUES), device=flat.device)].double() for flat in picked
        ]
        if not picked:
            return {}
        found = torch.cat([values.to(picked[0].device) for values in picked]).tolist()
    values, place = {}, 0
    for name, some in zip(names, picked):
        values[name] = found[place : place + len(some)]
        place += len(some)
    return values


def _spread(count: int, most: int) -> list[int]:
    """Places from the first to the last of `count`, at most so many."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def changed(backbone: Backbone, before: Any, trained: Collection[str] = ()) -> list[str]:
    """The parameters whose sampled values are others than `before`, as `sampled` gave them.

    Parameters that are not in the model as numbers (quantized ones), and those in `trained`, are passed over; casts to
    bfloat16 or float16 are no change.
    """
    if not isinstance(before, Mapping):  # a graft from before there were samples
        return []
    present = {
        name: parameter for name, parameter in parameters_of(backbone.model).items()
        if name in before and name not in trained and parameter.dtype.is_floating_point and not parameter.is_meta
    }  # fmt: skip
    now = _values(present, list(present))
    return [name for name, values in now.items() if not _same(values, before[name])]


def _same(left: Sequence[float], right: Any) -> bool:
    return (
        isinstance(right, Sequence)
        and len(left) == len(right)
        and all(math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for a, b in zip(left, right))
    )


def told(source: str, what: str, names: Sequence[str]) -> str:
    """The warning: `what` was trained on other values of the parameters `names`."""
    return (
        f"{source} has the names and shapes of the model that {what} was trained on, and other weights (in "
        f"{listing(names, 3)}); its answers will be others. Name the model that it was trained on."
    )
