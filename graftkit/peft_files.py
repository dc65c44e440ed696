"""Adapters that PEFT wrote, read into the methods of this package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from graftkit.errors import UserError, listing
from graftkit.files import read_json, read_tensors
from graftkit.graft_files import PEFT_CONFIG, PEFT_TENSORS, Stored

# fields of a LoRA configuration whose non-default values change the result and are not read yet
UNREAD = {
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "target_parameters": None,
    "trainable_token_indices": None,
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # ways to start that rewrite the base's weights


def read_peft(folder: Path) -> Stored:
    """A LoRA adapter of PEFT as `lora(...)`; its saved modules are the head, or unfrozen."""
    config = read_json(folder / PEFT_CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{folder / PEFT_CONFIG} is not the configuration of an adapter.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{folder / PEFT_CONFIG}: peft_type is {kind!r}; only LORA adapters of PEFT are read."
        )
    unread = [name for name, default in UNREAD.items() if config.get(name, default) not in (default, None)]
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        unread.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if unread:
        raise UserError(f"{folder / PEFT_CONFIG} uses {listing(unread)}, which graftkit does not read yet.")
    contents, _ = read_tensors(folder / PEFT_TENSORS)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(
            f"{folder / PEFT_CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; both must be numbers."
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    tensors, modules = _rename(contents, folder)
    arguments: dict[str, Any] = {
        "rank": rank,
        "alpha": float(scale * rank),
        "sites": "re:" + "|".join(re.escape(module) for module in modules),
        "dropout": float(config.get("lora_dropout", 0.0)),
    }
    method = f"lora({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    saved = tuple(name for name in tensors if ".lora_default." not in name)
    return Stored(folder, method, tensors, backbone=config.get("base_model_name_or_path"), saved=saved)


def _rename(contents: dict[str, Tensor], folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    for key, tensor in contents.items():
        name = key.removeprefix("base_model.model.")
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if name == key or (".lora_" in name and match is None):
            raise UserError(f"{folder / PEFT_TENSORS}: {key!r} is not a LoRA tensor that graftkit reads.")
        if match is None:
            tensors[name] = tensor
        else:
            tensors[f"{match[1]}.lora_default.{match[2]}"] = tensor
            if match[1] not in modules:
                modules.append(match[1])
    return tensors, modules
