"""The blocks of a model: the modules that repeat and hold most of it."""

from __future__ import annotations

from torch import nn

from graftkit.backbone.anatomy import base_modules, holds_query, is_map
from graftkit.backbone.walk import modules_of, parameters_of

Members = list[tuple[str, nn.Module]]
LISTS = (nn.ModuleList, nn.Sequential)
SHARE = 1 / 3  # of the largest class, for example for an encoder's blocks beside a decoder's


def find_blocks(model: nn.Module) -> Members:
    """Return (name, module) of each block in order.

    Blocks are members of lists (`nn.ModuleList`, `nn.Sequential`) with at least two linear layers or convolutions. Their
    class is the one with the most parameters in total; another class of similar size beside it (encoder and decoder)
    counts too. If such modules are stages, which hold lists and no attention outside these, the blocks are the members
    of those lists.
    """
    classes = _listed(model)
    if not classes:
        return []
    sizes = {kind: sum(_size(module) for _, module in members) for kind, members in classes.items()}
    largest = max(sizes, key=lambda kind: sizes[kind])  # the first, and so outermost, of equals
    chosen: Members = []
    for kind, members in classes.items():
        beside = not any(_nested(name, other) for name, _ in members for other, _ in classes[largest])
        if kind is largest or (beside and sizes[kind] >= SHARE * sizes[largest]):
            chosen += members
    order = {name: index for index, name in enumerate(modules_of(model))}
    blocks = [block for member in chosen for block in _within(*member)]
    return sorted(blocks, key=lambda block: order[block[0]])


def _listed(model: nn.Module) -> dict[type, Members]:
    """Return list members with at least two layers, by class, without those inside another member of their class.

    A single member of an `nn.Sequential` is not a block: sequences also hold parts that do not repeat.
    """
    found: dict[type, Members] = {}
    repeats: set[type] = set()
    for name, container in base_modules(model):
        if not isinstance(container, LISTS):
            continue
        for child_name, child in container.named_children():
            if isinstance(child, LISTS) or not _is_composite(child):
                continue
            members = found.setdefault(type(child), [])
            path = f"{name}.{child_name}" if name else child_name
            if not any(path.startswith(f"{other}.") for other, _ in members):
                if members or isinstance(container, nn.ModuleList):
                    repeats.add(type(child))
                members.append((path, child))
    return {kind: members for kind, members in found.items() if kind in repeats}


def _within(name: str, block: nn.Module) -> Members:
    """Return the block itself, or the blocks of the list in it if it is a stage."""
    for list_name, container in modules_of(block).items():
        children = list(container.named_children()) if isinstance(container, LISTS) else []
        alike = len({type(child) for _, child in children}) == 1
        if not alike or not all(_is_composite(child) for _, child in children):
            continue
        outside = [
            module
            for path, module in modules_of(block).items()
            if not _nested(path, list_name) and holds_query(path, module)
        ]
        if 2 * _size(container) > _size(block) and not outside:
            path = f"{name}.{list_name}"
            return [inner for leaf, child in children for inner in _within(f"{path}.{leaf}", child)]
    return [(name, block)]


def _is_composite(module: nn.Module) -> bool:
    return sum(is_map(part) for part in modules_of(module).values()) >= 2


def _nested(name: str, other: str) -> bool:
    """Return whether two modules are the same or one contains the other."""
    return name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in parameters_of(module).values())
