"""Differences between versions of the libraries below, and the tested versions.

Each entry says which versions it applies to. A lookup either succeeds or raises an error that names the library and its
version: a silent default could change results. Libraries are imported lazily, as the command line loads this first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graftkit.errors import UserError, first_line

WATCHED = ("torch", "transformers", "peft", "accelerate", "datasets")


# ---- versions


class UntestedVersion(UserWarning):
    """A library is older or newer than the tested versions."""


@dataclass(frozen=True)
class Tested:
    """The versions of a library that were tested: from `oldest` up to, but not including, `bound`."""

    name: str
    oldest: str
    bound: str

    def __str__(self) -> str:
        return f"{self.name} from {self.oldest} up to below {self.bound}"

    def has(self, version: str) -> bool:
        return _number(self.oldest) <= _number(version) < _number(self.bound)


def _number(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' as (2, 13); anything after the second number is treated as a patch release."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def tested() -> dict[str, Tested]:
    """Return the tested versions by library, from the installed package's metadata; empty if not installed."""
    try:
        lines = importlib.metadata.requires("graftkit") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    oldest: dict[str, str] = {}
    bounds: dict[str, str] = {}
    for line in lines:
        needed, _, when = line.partition(";")
        name = re.split(r"[<>=!~ \[]", needed, maxsplit=1)[0].lower()
        if match := re.search(r">=\s*([\d.]+)", needed):
            oldest.setdefault(name, match[1])
        if "tested" in when and (match := re.search(r"<\s*([\d.]+)", needed)):
            bounds[name] = match[1]
    return {
        name: Tested(name, oldest[name], bounds[name])
        for name in WATCHED
        if name in oldest and name in bounds
    }


def installed(name: str) -> str | None:
    """Return the version of a library; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def warn_of_untested() -> None:
    """Warn once per process, in one line, of libraries in untested versions."""
    found = []
    for name, versions in tested().items():
        version = installed(name)
        if version is not None and not versions.has(version):
            found.append(f"{name} {version} (tested: {versions.oldest} up to below {versions.bound})")
    if found:
        message = f"GraftKit was not tested with {', '.join(found)}"
        # without a real file name, no source line is shown below the warning
        warnings.warn_explicit(message, UntestedVersion, "graftkit", 1, module="graftkit.libraries")


def lacking(library: str, what: str) -> UserError:
    """Return the error for a library that lacks something GraftKit relies on."""
    versions = tested().get(library)
    known = f" GraftKit was tested with {versions}; install one of those." if versions else ""
    return UserError(f"{library} {installed(library) or ''} {what}, which graftkit relies on.{known}")


# ---- transformers: the cache of keys and values

# An argument and an output of models. From 5.24 on it is `cache` everywhere. Up to 5.23 it is `past_key_values`, of
# Mamba, Mamba 2, FalconMamba and xLSTM `cache_params`; both are taken and renamed by 5.24, behind the hooks that look
# here. RWKV says `state` in all versions. (FlauBERT and XLM up to 5.23 call something of their own `cache`.)
OLD_CACHES = ("past_key_values", "cache_params")
STATE = "state"


@functools.cache
def cache_name() -> str:
    """Return the name that models use for their cache: 'cache' (transformers 5.24) or 'past_key_values' (5.17 to 5.23)."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = inspect.signature(BaseModelOutputWithPast).parameters
    for name in ("cache", OLD_CACHES[0]):
        if name in names:
            return name
    raise lacking("transformers", "calls the cache of its models neither 'cache' nor 'past_key_values'")


def cache_names() -> tuple[str, ...]:
    """Return all names that a cache may have in a call or an output of the installed version."""
    return tuple(dict.fromkeys((cache_name(), *OLD_CACHES, STATE)))


def takes_cache(model: Any) -> bool:
    """Return whether a model accepts a cache of keys and values. Users' own models may use the older name."""
    return not {cache_name(), OLD_CACHES[0]}.isdisjoint(inspect.signature(model.forward).parameters)


def tokens_seen(given: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model has already read, according to the cache in the arguments of a call.

    None if the cache is the non-empty state of a recurrent model, such as Mamba.
    """
    found = [(name, given[name]) for name in cache_names() if given.get(name) is not None]
    if not found:
        return 0
    name, cache = found[0]
    from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

    if name == STATE:
        return None
    if isinstance(cache, Cache) and not isinstance(cache, EncoderDecoderCache):
        layers = cache.layers
        if layers and not any(isinstance(layer, CacheLayerMixin) for layer in layers):
            return None if cache.has_previous_state() else 0
    elif not isinstance(cache, Cache | tuple | dict):  # xLSTM's
        return None
    return int(cache.get_seq_length())


# ---- transformers: names that models have or have not

# An architecture known to have each method: if it no longer does, the method has been renamed. All exist from 5.17 to
# 5.24.
WITNESSES = {
    "_shift_right": ("transformers.models.t5.modeling_t5", "T5PreTrainedModel"),
    "_get_feat_extract_output_lengths": (
        "transformers.models.wav2vec2.modeling_wav2vec2", "Wav2Vec2PreTrainedModel",
    ),
    "_get_feature_vector_attention_mask": (
        "transformers.models.wav2vec2.modeling_wav2vec2", "Wav2Vec2PreTrainedModel",
    ),
}  # fmt: skip


def method_of(model: Any, name: str) -> Callable | None:
    """Return a method that some transformers architectures have; None for the others."""
    found = getattr(model, name, None)
    if found is None:
        _witness(name)
    return found


@functools.cache
def _witness(name: str) -> None:
    module, kind = WITNESSES[name]
    if not hasattr(getattr(importlib.import_module(module), kind, None), name):
        raise lacking("transformers", f"has no {kind}.{name}")


@dataclass(frozen=True)
class Rotary:
    """A model's rotary positions: `angles(x, position_ids)` computes the rotation that `turn(q, k, *angles)` applies."""

    angles: Any
    turn: Callable
    kind: str


def rotary_of(model: Any, attention: Any) -> Rotary | None:
    """Return the rotary positions of an attention module; None if the model has none, or a kind of its own.

    `inv_freq`, `rope_type` and `apply_rotary_pos_emb` in the attention's file: transformers 5.17 to 5.24.
    """
    _rotary_names()
    module = importlib.import_module(type(attention).__module__)
    angles = next((m for m in model.modules() if hasattr(m, "inv_freq")), None)
    turn, kind = getattr(module, "apply_rotary_pos_emb", None), getattr(angles, "rope_type", None)
    return None if turn is None or kind is None else Rotary(angles, turn, kind)


@functools.cache
def _rotary_names() -> None:
    from transformers.models.llama import modeling_llama

    if not hasattr(modeling_llama, "apply_rotary_pos_emb"):
        raise lacking("transformers", "has no apply_rotary_pos_emb beside Llama's attention")
    config = modeling_llama.LlamaConfig(hidden_size=8, num_attention_heads=1)
    rotary = modeling_llama.LlamaRotaryEmbedding(config)
    for name in ("inv_freq", "rope_type"):
        if not hasattr(rotary, name):
            raise lacking("transformers", f"has no {name} in Llama's rotary positions")


def image_processors() -> Any:
    """`AutoImageProcessor`, from its own module: transformers 5.17 takes the name at the top for one that needs torchvision,
    though Pillow is enough for it (5.18 on).
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor


# ---- transformers: the attention function


def attention_of(model: Any) -> str:
    """Return the name of the attention function that a transformers model calls (5.17 to 5.24)."""
    name = getattr(model.config, "_attn_implementation", None)
    if name is None:
        raise lacking(
            "transformers", f"does not say in {type(model.config).__name__} which attention is used"
        )
    return name


def set_attention(model: Any, name: str) -> None:
    """Make all parts of a transformers model call the attention function of that name.

    Up to 5.19 `set_attn_implementation` skips parts with a copy of the model's config, such as T5's encoder and decoder,
    so keys and values added there would be trained but never read. From 5.20 on it is sufficient.
    """
    from transformers import PreTrainedModel

    model.set_attn_implementation(name)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_attn_implementation():
            if attention_of(part) != name:
                part.set_attn_implementation(name)
            if attention_of(part) != name:
                raise lacking(
                    "transformers", f"leaves {type(part).__name__} with another attention than {name}"
                )


# ---- PEFT: outside its documented interface

# The locations of these in PEFT 0.18 to 0.21. The set of tuners differs: peft_tuners.py takes those of the installed
# version from the mappings. Of the documented tuners, these were added after 0.18:
TUNERS_SINCE = {"HIRA": "0.20"}
PEFT_PARTS = {
    "configurations": ("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING"),
    "tuners": ("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING"),
    "prefixes of keys": ("peft.mapping", "PEFT_TYPE_TO_PREFIX_MAPPING"),
    "layer": ("peft.tuners.tuners_utils", "BaseTunerLayer"),
    "buffers": ("peft.tuners._buffer_dict", "BufferDict"),
}


def peft_part(what: str) -> Any:
    """Return one of `PEFT_PARTS`. Raises `UserError` if PEFT is not installed or has no such part."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("peft() needs PEFT, which is not installed: pip install peft")
    module, name = PEFT_PARTS[what]
    try:
        return getattr(importlib.import_module(module), name)
    except (
        ImportError,
        AttributeError,
    ) as error:  # also if PEFT cannot be imported with this transformers
        raise lacking("peft", f"has no {module}.{name} ({first_line(error)})") from error


def cast_adapter(tuner: Any, adapter: str) -> None:
    """Cast an adapter's new parameters to fp32, as PEFT does by default (0.18 to 0.21)."""
    cast = getattr(tuner, "_cast_adapter_dtype", None)
    if cast is None:
        raise lacking("peft", f"has no _cast_adapter_dtype in {type(tuner).__name__}")
    cast(adapter)


# ---- bitsandbytes


def leave_unpacked(module: Any) -> None:
    """Keep a 4-bit layer from packing its weight for bf16 products on a CPU (bitsandbytes 0.49 and 0.50)."""
    if all(kind.__name__ != "Linear4bit" for kind in type(module).__mro__):
        return
    if not hasattr(
        module, "support_avx512bf16_for_cpu"
    ):  # without it, gradients would be lost after an evaluation
        raise lacking("bitsandbytes", "has no Linear4bit.support_avx512bf16_for_cpu")
    module.support_avx512bf16_for_cpu = False
