"""Find out what is frozen, and when.

The longest prefix of the network that no trained parameter touches gives the same output for a row in every
epoch, so `engine.cached` can compute it once. It runs in eval mode and without gradients.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from graftkit.backbone.anatomy import has_statistics
from graftkit.backbone.walk import modules_of
from graftkit.grafts.graft import Graft
from graftkit.methods.base import OutputHead
from graftkit.optim.labels import Labels


@dataclass(frozen=True)
class Phase:
    """The steps `start` to `end` (0-based, exclusive) in which the same parameters are trained.

    `labels`: these parameters; `depth`: the number of leading frozen blocks.
    """

    start: int
    end: int
    labels: Labels
    depth: int


def phases(graft: Graft, steps: int, per_epoch: int) -> tuple[Phase, ...]:
    """Return the phases of training: one for most methods, several for gradual unfreezing."""

    def at(step: int) -> Labels:
        return graft.labels_at(step, step / per_epoch)

    found: list[Phase] = []
    start = 0
    while start < steps:
        labels = at(start)
        # binary search for the last step with the same labels, as labels only ever grow
        end = bisect_right(range(start, steps), len(labels), key=lambda step: len(at(step))) + start
        found.append(Phase(start, end, labels, frozen_depth(graft, labels)))
        start = end
    return tuple(found) or (Phase(0, 0, {}, frozen_depth(graft, {})),)


def frozen_depth(graft: Graft, labels: Labels | None = None) -> int:
    """Return the number of leading blocks with no trained parameter in or before them; all if only a head is trained.

    `labels`: what is trained now; by default all that the graft labels. The order is that of definition, so a part
    between two blocks, such as the downsampling between stages, comes after the lower one.
    """
    backbone = graft.backbone
    order = {name: i for i, name in enumerate(modules_of(backbone.model))}
    blocks = [order[name] for name in backbone.blocks]
    additions = {name for name, _ in graft.additions()}
    depth = len(blocks)
    for name, group in (graft.labels if labels is None else labels).items():
        owner = _site_of(name, additions)
        block = _block_of(owner, backbone.blocks)
        if block is not None:
            depth = min(depth, block)
        elif group.role != "head":
            depth = min(depth, sum(position < order[owner] for position in blocks))
    return depth


def _site_of(parameter: str, additions: set[str]) -> str:
    """Return the module that holds a parameter; for an addition, the module that it was placed on."""
    parts = parameter.split(".")[:-1]
    for i in range(1, len(parts) + 1):
        if ".".join(parts[:i]) in additions:
            return ".".join(parts[: i - 1])
    return ".".join(parts)


def _block_of(name: str, blocks: tuple[str, ...]) -> int | None:
    return next((i for i, block in enumerate(blocks) if name == block or name.startswith(block + ".")), None)


def set_training(graft: Graft, depth: int, labels: Labels | None = None) -> None:
    """Set training mode after the frozen prefix and eval mode in it, and in everything below a head trained alone.

    Modules before the first trained block belong to the prefix, even outside blocks: any randomness there comes before
    the blocks. `labels`: what is trained now. Running statistics that are unfrozen later do not move until then.
    """
    backbone = graft.backbone
    model = backbone.model
    now = graft.labels if labels is None else labels
    head = head_of(graft)
    if head is not None and only_head_trains(graft, now):
        model.eval()
        head.train()
        return
    model.train()
    waiting = {name.rpartition(".")[0] for name in graft.labels if name not in now}
    names = list(modules_of(model))
    bound = names.index(backbone.blocks[min(depth, len(backbone.blocks) - 1)]) if depth else 0
    for position, (name, module) in enumerate(modules_of(model).items()):
        block = _block_of(name, backbone.blocks)
        frozen = position < bound if block is None else block < depth
        if frozen or (name in waiting and has_statistics(module)):
            module.training = False


def head_of(graft: Graft) -> OutputHead | None:
    """Return the head that the graft placed on the model, or None."""
    return next((module for _, module in graft.additions() if isinstance(module, OutputHead)), None)


def only_head_trains(graft: Graft, labels: Labels) -> bool:
    """Return whether everything trained comes after the pooled features, which then never change."""
    head = head_of(graft)
    if head is None or not head.steady:
        return False
    own = {id(parameter) for parameter in head.parameters()}
    return all(id(parameter) in own for name, parameter in graft.parameters.items() if name in labels)


def moving_now(graft: Graft, labels: Labels) -> set[str]:
    """Return what may move while the parameters of `labels` are trained: these, their running statistics, and the
    buffers of the graft's additions.
    """
    waiting = {name for name in graft.labels if name not in labels}
    owners = {name.rpartition(".")[0] for name in waiting}
    still = waiting | {name for name in graft.statistics if name.rpartition(".")[0] in owners}
    return set(graft.state) - still


def spare_now(graft: Graft, labels: Labels) -> set[str]:
    """Return the base parameters of `labels` outside blocks and head, of methods that also train in the blocks."""
    backbone = graft.backbone
    sites = {site.name: site for site in backbone.sites}
    owners = {name: sites[name.rpartition(".")[0]] for name in labels if name in backbone.base_parameters}
    wide = {labels[name].method for name, site in owners.items() if site.block is not None}
    return {
        name
        for name, site in owners.items()
        if site.block is None and site.role != "head" and labels[name].method in wide
    }
