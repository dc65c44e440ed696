"""The arguments of modules' `forward`, inspected once for each class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

# by function, not by module: modules of a class share one, and a module whose forward is replaced has another
_Signatures = WeakKeyDictionary[Callable[..., Any], inspect.Signature]
_of_methods: _Signatures = WeakKeyDictionary()
_of_functions: _Signatures = WeakKeyDictionary()


def signature_of(module: nn.Module) -> inspect.Signature:
    """Return `inspect.signature(module.forward)`, computed once for each function that is some module's `forward`.

    `inspect.signature` takes as long as a small layer, and hooks need it at every call.
    """
    forward = module.forward
    function, known = forward, _of_functions
    if isinstance(forward, MethodType):
        function, known = forward.__func__, _of_methods
    found = known.get(function)
    if found is None:
        found = known[function] = inspect.signature(forward)
    return found


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the arguments that a module's `forward` takes, by name and in order."""
    return signature_of(module).parameters
