"""The tuners of the installed PEFT, and which of them `peft` supports."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from graftkit.errors import UserError, listing, nearest
from graftkit.libraries import TUNERS_SINCE, installed, peft_part
from graftkit.methods.shared.advice import general, reading, recommended, selecting

# tuners that are not supported, and why
REFUSED = {
    "ADALORA": "changes its ranks by calls to PEFT's own model and a loss of it",
    "ADAPTION_PROMPT": "replaces Llama's attention by its own",
    "CARTRIDGE": "holds keys and values for a cache",
    "CPT": "adds virtual tokens with their own loss",
    "MULTITASK_PROMPT_TUNING": "adds virtual tokens for several tasks",
    "POLY": "needs a task id with each row",
    "PREFIX_TUNING": "does not wrap modules",
    "PROMPT_TUNING": "does not wrap modules",
    "P_TUNING": "does not wrap modules",
    "SHADOW": "runs a second, smaller model beside the backbone",
    "XLORA": "mixes adapters that were trained before",
}
# fields of PEFT's configurations that GraftKit expresses in another way: see `instead_of`
OURS = {
    **dict.fromkeys(
        ("exclude_modules", "layers_pattern", "layers_to_transform", "target_parameters"),
        "select modules with sites=...",
    ),
    "bias": "use {biases} beside it",
    "layer_replication": "build the backbone with these layers",
    "modules_to_save": "use {modules} beside it",
    "ensure_weight_tying": "use {embeddings} beside it",
    "trainable_token_indices": "use {embeddings} beside it",
    "use_asa": "it needs a call after each step",
    **dict.fromkeys(("megatron_config", "megatron_core"), "PEFT would import the module that it names"),
}
IDLE = {  # fields without effect
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
GROUPED = {"LILY"}  # shares matrices among the modules matched by one entry of target_modules
# learning rates; tuners that train coefficients of fixed matrices need higher ones than those that train matrices
RATE = 1e-3
COEFFICIENTS = "C3A FOURIERFT FROD IA3 PVERA RANDLORA TINYLORA UNILORA VBLORA VERA WAVEFT"
RATES = {"HIRA": 3e-3} | dict.fromkeys(COEFFICIENTS.split(), 1e-2)


def instead_of(field: str) -> str:
    """How that is said here which a field of PEFT's configurations says."""
    return OURS[field].format(
        biases=recommended("trains_biases"),
        modules=recommended("gives_outputs", "selects"),
        embeddings=selecting("embeddings"),
    )


def mappings() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return PEFT's configuration and model classes by type of adapter."""
    configs, tuners = peft_part("configurations"), peft_part("tuners")
    return {kind.value: config for kind, config in configs.items()}, {
        kind.value: t for kind, t in tuners.items()
    }


def defaults_of(kind: str) -> dict[str, Any]:
    """Return the fields of the configuration of a type of adapter, with their defaults."""
    return {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(mappings()[0][kind])
    }


def kind_of(tuner: str) -> str:
    """Return PEFT's type of adapter for a tuner's name. Raises `UserError` if it is unknown or not supported."""
    known = mappings()[0]
    from peft import PromptLearningConfig

    plain = re.sub("[-_]", "", tuner).upper()
    kind = next((kind for kind in known if kind.replace("_", "") == plain), None)
    prompts = {kind for kind, config in known.items() if issubclass(config, PromptLearningConfig)}
    if kind is None:
        names = sorted(name.lower() for name in set(known) - set(REFUSED) - prompts)
        since = f" It came with PEFT {TUNERS_SINCE[plain]}." if plain in TUNERS_SINCE else ""
        raise UserError(
            f"peft({tuner!r}): PEFT {installed('peft')} has no such tuner (known: {listing(names, 60)})."
            f"{since or nearest(tuner, names)}"
        )
    if kind in REFUSED or kind in prompts:
        raise UserError(
            f"peft({tuner!r}) is not supported: {kind} {REFUSED.get(kind, 'does not wrap modules')}; "
            f"use {reading(kind) or general()}."
        )
    return kind
