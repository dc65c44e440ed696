"""A second device for machines that have one only: its tensors cannot be mixed with those of the CPU.

`DEVICE` computes as the CPU does, on a CPU tensor that each of its own wraps, but like a GPU it refuses tensors of two
devices in one operation, `.numpy()` without `.cpu()`, and whatever else PyTorch asks of a device. So a tensor that was
made without its device is found without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration

NAME = "second"


class _Module:
    """What PyTorch wants to know of a device, as `torch.second`."""

    _is_in_bad_fork = staticmethod(lambda: False)
    is_initialized = staticmethod(lambda: True)
    is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
DEVICE = torch.device(NAME, 0)
aten = torch.ops.aten
# what a GPU takes from the CPU too: whole copies, and places to look at or to put something
FROM_CPU = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
LIKE_VIEWS = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
READ = (torch.Tensor.tolist, torch.Tensor.data_ptr, torch.Tensor.storage, torch.Tensor.untyped_storage)


class There(torch.Tensor):
    """A tensor on the second device: `held` has its numbers on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.held = values
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> There:
        return There(inner["held"])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:  # has no kernel to choose here
            function = _attention
        if function in READ:
            return function(args[0].held)
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **kwargs)
        if function == torch.Tensor.data.__set__:  # PyTorch exchanges what it knows of
            args[0].held = args[1].held
        return found

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, *args, **(kwargs or {}))


class Values(TorchFunctionMode):
    """Within it, `torch.tensor(values, device=DEVICE)` works; PyTorch's own way there finds no kernel in Python."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if (
            function in (torch.tensor, torch.as_tensor)
            and device is not None
            and torch.device(device).type == NAME
        ):
            del kwargs["device"]
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation on the wrapped values, where all of its tensors are on one device."""
    tensors: list[torch.Tensor] = []
    _each((args, kwargs), tensors.append)
    packet = operation.overloadpacket
    if packet not in FROM_CPU:
        strangers = [t for t in tensors if not isinstance(t, There) and t.dim() > 0]
        assert not strangers or not any(isinstance(t, There) for t in tensors), (
            f"{operation} is given tensors of two devices: {[(tuple(t.shape), str(t.device)) for t in tensors]}"
        )
    target = kwargs.get("device")
    leaves = target is not None and torch.device(target).type != NAME
    if target is not None and not leaves:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    given, named = _each((args, kwargs), lambda tensor: tensor.held if isinstance(tensor, There) else tensor)
    found = LIKE_VIEWS.get(operation, operation)(*given, **named)
    if leaves:
        return found
    known = {id(t.held): t for t in tensors if isinstance(t, There)}  # what was changed in place
    return _each(found, lambda tensor: _wrapped(tensor, known))


def _each(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same value with each tensor in it changed; `tree_map` of PyTorch takes three times as long."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)([_each(part, change) for part in value])
    if type(value) is dict:
        return {key: _each(part, change) for key, part in value.items()}
    return value


def _wrapped(tensor: torch.Tensor, known: dict[int, There]) -> There:
    return known[id(tensor)] if id(tensor) in known else There(tensor)


_library = torch.library.Library("_", "IMPL")
_library.fallback(compute, dispatch_key="PrivateUse1")
_factories = torch.library.Library("aten", "IMPL")
for _factory in (  # PyTorch has these resize an empty tensor, which a wrapper cannot
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m, aten.randperm.default,
    aten.randperm.generator, aten.linspace.default,
):  # fmt: skip
    _factories.impl(_factory, partial(compute, _factory), "PrivateUse1")
