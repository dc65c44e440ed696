"""Run PEFT's layers beside the modules they adapt.

PEFT replaces a module by its own layer and keeps the module inside, as `base_layer`. Here the layer is placed beside
the module. PEFT creates it around a stand-in; in each call its `base_layer` is another stand-in, which computes with
the module's current parameters and bypasses its hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone.anatomy import Added
from graftkit.methods.base import Addition

INSIDE = "default"  # PEFT's name for the adapter in its layers


class Bridge(Addition):
    """One of PEFT's layers beside the module at its site; it holds the layer's tensors that no other bridge holds.

    `held`: ids of the tensors that are already held; those of this layer are added to it.
    """

    layer: Any
    tuner: Any

    def __init__(self, layer: Any, tuner: Any, held: set[int]) -> None:
        super().__init__()
        for name, child in layer.named_children():
            rest = _rest(child, held)
            if rest is not None:
                self.add_module(name, rest)
        self._parameters, self._buffers = layer._parameters, layer._buffers
        self._non_persistent_buffers_set = layer._non_persistent_buffers_set
        # neither is a child: a search for linear layers would find PEFT's layer
        self.__dict__["layer"], self.__dict__["tuner"] = layer, tuner

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        base, used = stand_in(site), []

        def forward(*inputs: Any, **more: Any) -> Tensor:
            if inputs and args and inputs[0] is args[0]:
                used.append(True)
                return output
            return site.forward(*inputs, **more)

        base.__dict__["forward"] = forward
        self.layer.training = self.training
        self.layer.__dict__["base_layer"] = base
        try:
            result = self.layer(*args, **kwargs)
        finally:
            del self.layer.__dict__["base_layer"]
        if (
            not used and len(site._forward_hooks) > 1
        ):  # additions to the output by others, which PEFT did not see
            result = result + (output - site.forward(*args, **kwargs))
        return result.to(output.dtype)


class Shared(Added):
    """Tensors that PEFT's model holds for all layers, outside any layer."""

    def __init__(self, tuner: Any, held: set[int]) -> None:
        super().__init__()
        for name, child in tuner.named_children():
            rest = _rest(child, held) if name != "model" else None
            if rest is not None:
                self.add_module(name, rest)


class Whole(nn.Module):
    """PEFT's model with the names it has inside a `PeftModel`."""

    def __init__(self, tuner: Any) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_config = tuner.peft_config

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def written(tuner: Any) -> dict[str, Tensor]:
    """Return the tensors that PEFT writes, by its keys: the parameters themselves, or a copy if one is written twice."""
    from peft import get_peft_model_state_dict

    whole = Whole(tuner)
    state = whole.state_dict(keep_vars=True)
    tensors = get_peft_model_state_dict(
        whole, state_dict=state, adapter_name=INSIDE, save_embedding_layers=False
    )
    seen: set[int] = set()
    for key, tensor in tensors.items():
        if id(tensor) in seen:
            tensors[key] = tensor.detach().clone()
        seen.add(id(tensor))
    return tensors


def stand_in(module: nn.Module, own: bool = False, clone: bool = False) -> Any:
    """Return a module of the same class with the same parameters, without hooks and additions.

    `own`: with its own parameters, on the same memory unless `clone`; zeros for parameters on the meta device.
    """
    twin: Any = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if name.endswith("_hooks"):
            twin.__dict__[name] = type(value)()
    twin._modules = {name: child for name, child in module._modules.items() if not isinstance(child, Added)}
    if own:
        twin._parameters = {
            name: None if p is None else nn.Parameter(_values(p, clone), requires_grad=False)
            for name, p in module._parameters.items()
        }
    return twin


def _values(parameter: Tensor, clone: bool) -> Tensor:
    if parameter.is_meta:
        return torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
    return parameter.detach().clone() if clone else parameter.data


def hang(root: nn.Module, name: str, module: nn.Module) -> None:
    """Add a module at its dotted name below `root`, creating empty parents."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, module)


def _rest(module: nn.Module, held: set[int]) -> nn.Module | None:
    """Return a module, or a copy of its structure with only the tensors not held yet; None if there are none."""
    tensors = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    if not tensors & held:
        held |= tensors
        return module
    rest = nn.Module()
    for name, child in module.named_children():
        part = _rest(child, held)
        if part is not None:
            rest.add_module(name, part)
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in held:
            rest.register_parameter(name, parameter)
    held |= tensors
    return rest if any(True for _ in [*rest.parameters(), *rest.buffers()]) else None
