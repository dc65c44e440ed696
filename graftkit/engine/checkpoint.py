"""Checkpoints: one safetensors file each, written to a temporary name, synced and renamed.

A checkpoint holds the graft's tensors (`Graft.state`), the optimizer's state and the step. The order of the data and all
randomness are functions of (seed, step), so the step is the whole position; the frozen base is never written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftkit.errors import UserError
from graftkit.files import read_tensors, write_tensors

BEST = "best.safetensors"


def save(folder: Path, step: int, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer,
         position: dict[str, Any]) -> Path:  # fmt: skip
    """Write the checkpoint of a step, then remove the older ones."""
    tensors: dict[str, Tensor] = {f"parameters/{name}": p for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    path = folder / f"step-{step:08d}.safetensors"
    write_tensors(path, tensors, {"position": json.dumps({"step": step, **position})})
    for old in existing(folder)[:-1]:
        old.unlink(missing_ok=True)
    return path


def existing(folder: Path) -> list[Path]:
    """Checkpoints that are whole, oldest first."""
    return sorted(folder.glob("step-????????.safetensors"))


def restore(
    folder: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Load the newest checkpoint into parameters and optimizer; its position, or None where there is none."""
    paths = existing(folder)
    if not paths:
        return None
    tensors, metadata = read_tensors(paths[-1])
    load_parameters(
        parameters,
        {k.removeprefix("parameters/"): v for k, v in tensors.items() if k.startswith("parameters/")},
        paths[-1],
    )
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            state, _, name = rest.partition("/")
            parameter = parameters[name]
            optimizer.state[parameter][state] = value.to(parameter.device)  # a fused optimizer's steps too
    return json.loads(metadata["position"])


def save_best(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Keep the present values as the best so far."""
    write_tensors(folder / BEST, parameters)


def load_best(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Put the best values back."""
    load_parameters(parameters, read_tensors(folder / BEST)[0], folder / BEST)


def load_parameters(parameters: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    if set(parameters) != set(tensors):
        raise UserError(f"{path} holds other parameters than this run trains; it belongs to another recipe.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise UserError(f"{path}: {name!r} has another shape than in this run.")
            parameter.copy_(tensors[name])
