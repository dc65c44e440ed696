"""Bytes of what training adds to the weights: gradients and the state of the optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping

import torch

from graftkit.grafts.graft import Graft
from graftkit.optim.base import Optimizer
from graftkit.optim.labels import Labels


def gradient_bytes(
    graft: Graft, labels: Labels, *, step_in_backward: bool = False, rounded: Container[str] = (),
    accumulating: Optimizer | None = None,
) -> int:  # fmt: skip
    """Return the bytes of the gradients of these parameters, which have the parameters' type: fp32, or bf16 if in `rounded`.

    `step_in_backward`: the most that exist at once. The backward pass computes the gradients of one module (a weight and
    its bias) together, and each is freed after its step. That of a weight with several places in the model, such as an
    embedding that is the output layer too, is not complete before the last of them, and waits beside the others.
    `accumulating`: the optimizer that then takes the steps of several batches; between these it keeps projections, in fp32,
    and the gradients of what it does not project.
    """
    sizes = {
        name: (2 if name in rounded else 4) * p.numel()
        for name, p in graft.parameters.items()
        if name in labels
    }
    if not step_in_backward:
        return sum(sizes.values())
    kept = 0
    if accumulating is not None:
        group_of = {id(p): group for group in graft.param_groups() for p in group["params"]}
        for name in list(sizes):
            parameter = graft.parameters[name]
            numbers = accumulating.accumulated(group_of[id(parameter)], parameter.shape)
            kept += sizes.pop(name) if numbers == parameter.numel() else 4 * numbers
    places = Counter(id(p) for _, p in graft.model.named_parameters(remove_duplicate=False))
    tied = {name for name, p in graft.parameters.items() if places[id(p)] > 1}
    modules: dict[str, int] = {}
    for name, size in sizes.items():
        if name not in tied:
            owner = name.rpartition(".")[0]
            modules[owner] = modules.get(owner, 0) + size
    return kept + sum(size for name, size in sizes.items() if name in tied) + max(modules.values(), default=0)


def optimizer_bytes(graft: Graft, optimizer: Optimizer, labels: Mapping[str, object]) -> int:
    """Return the most bytes of optimizer state for these parameters, which take their steps in fp32."""
    trained = {id(p) for name, p in graft.parameters.items() if name in labels}
    groups = []
    for group in graft.param_groups():
        chosen = [index for index, p in enumerate(group["params"]) if id(p) in trained]
        lists = {
            key: value for key, value in group.items() if isinstance(value, list)
        }  # one entry for each parameter
        groups.append(group | {key: [value[index] for index in chosen] for key, value in lists.items()})
    return optimizer.total_bytes(groups, torch.float32)
