"""A model's modules, parameters and buffers by name: what the methods of `nn.Module` yield, in linear time.

Torch passes every name up through one generator for each level above it, and that adds up: to attach a graft takes
dozens of walks through the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return what `model.named_modules()` yields: each module under its first name, in definition order."""
    found: dict[str, nn.Module] = {"": model}
    seen = {model}

    def walk(module: nn.Module, prefix: str) -> None:
        for leaf, child in module._modules.items():
            if child is not None and child not in seen:
                seen.add(child)
                path = prefix + leaf
                found[path] = child
                if child._modules:
                    walk(child, f"{path}.")

    walk(model, "")
    return found


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what `model.named_parameters()` yields: each parameter under its first name, in definition order."""
    return _tensors(model, "_parameters")


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what `model.named_buffers()` yields: each buffer under its first name, in definition order."""
    return _tensors(model, "_buffers")


def _tensors(model: nn.Module, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for path, module in modules_of(model).items():
        held = getattr(module, kind)
        if held:
            for leaf, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{leaf}" if path else leaf] = tensor
    return found
