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
    "layers_to_transform": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}


def read_peft(folder: Path) -> Stored:
    """A LoRA adapter of PEFT as `lora(...)`, with saved modules as `head(pooling='own')`."""
    config = read_json(folder / PEFT_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder / PEFT_CONFIG}: peft_type is {kind!r}; only LORA adapters of PEFT are read.")
    unread = [name for name, default in UNREAD.items() if config.get(name, default) not in (default, None)]
    if unread:
        raise UserError(f"{folder / PEFT_CONFIG} uses {listing(unread)}, which graftkit does not read yet.")
    contents, _ = read_tensors(folder / PEFT_TENSORS)
    rank = config.get("r", 8)
    scale = config.get("lora_alpha", 8) / (rank**0.5 if config.get("use_rslora") else rank)
    tensors, modules = _rename(contents, folder)
    arguments: dict[str, Any] = {
        "rank": rank,
        "alpha": float(scale * rank),
        "sites": "re:" + "|".join(re.escape(module) for module in modules),
        "dropout": float(config.get("lora_dropout", 0.0)),
    }
    method = f"lora({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    saved = [name for name in tensors if ".lora_default." not in name]
    if saved:
        output = [tensor for name, tensor in tensors.items() if name in saved and name.endswith(".weight")][-1]
        method += f" + head(classes={output.shape[0]}, pooling='own')"
    return Stored(folder, method, tensors, backbone=config.get("base_model_name_or_path"))


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
