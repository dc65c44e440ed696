"""PEFT's prefixes and prompts on models whose cache is called `cache`, as in transformers 5.24.

PEFT up to 0.21.2 knows the older name `past_key_values` alone: with a head of classes it refuses a prefix there, and it
generates as if there were none. Models are given both names here, and compute what they did.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from graftkit.libraries import OLD_CACHES, cache_name

OLD = OLD_CACHES[0]


def for_peft(model: Any) -> Any:
    """The model, which takes its cache under the older name too, and prepares it for generation under that name."""
    if cache_name() != OLD:
        for part in {model, model.base_model}:
            if cache_name() in inspect.signature(part.forward).parameters:
                _rename(part)
    return model


def _rename(model: Any) -> None:
    forward, prepare = model.forward, getattr(model, "prepare_inputs_for_generation", None)

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if OLD in kwargs:
            kwargs[cache_name()] = kwargs.pop(OLD)
        return forward(*args, **kwargs)

    known = inspect.signature(forward)
    names = list(known.parameters.values())
    at = next((i for i, p in enumerate(names) if p.kind is p.VAR_KEYWORD), len(names))
    more = inspect.Parameter(OLD, inspect.Parameter.KEYWORD_ONLY, default=None)
    renamed.__signature__ = known.replace(parameters=[*names[:at], more, *names[at:]])  # type: ignore[attr-defined]
    model.forward = renamed
    if prepare is None:
        return

    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> dict[str, Any]:
        given = prepare(*args, **kwargs)
        if cache_name() in given:
            given[OLD] = given.pop(cache_name())
        return given

    model.prepare_inputs_for_generation = prepared
