"""Checkpoints: one safetensors file each, written to a temporary name, synced and renamed.

The two newest are kept: if the newest turns out to be damaged, the run goes on from the one before.

A checkpoint holds the graft's tensors (`Graft.state`), the optimizer's state the averages of parameters if there are any, and the step. The order of the data and all
randomness are functions of (seed, step), so the step alone gives the position; the frozen base is never written.

An optimizer's state may hold tensors and Python numbers for each parameter, and numbers in its groups. All are restored
with their types; the learning rates of groups are functions of the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftkit.errors import UserError
from graftkit.files import read_tensors, write_tensors

BEST = "best.safetensors"
KEPT = 2


def save(folder: Path, step: int, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer,
         position: dict[str, Any], averages: Mapping[str, Tensor] | None = None) -> Path:  # fmt: skip
    """Write the checkpoint of a step. Of the older ones, the newest is kept. `averages`: of the trained parameters."""
    tensors: dict[str, Tensor] = {f"parameters/{name}": p for name, p in parameters.items()}
    tensors |= {f"averages/{name}": average for name, average in (averages or {}).items()}
    numbers: dict[str, float] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}/{name}"] = value
            elif isinstance(value, int | float):
                numbers[f"{key}/{name}"] = value
            elif value is not None:
                raise UserError(
                    f"{type(optimizer).__name__} stores {key!r} of a parameter as a {type(value).__name__}, which a "
                    "checkpoint cannot hold; the optimizer state may only hold tensors and numbers."
                )
    path = folder / f"step-{step:08d}.safetensors"
    metadata = {
        "position": json.dumps({"step": step, **position}),
        "optimizer": json.dumps({"state": numbers, "groups": list(map(_numbers, optimizer.param_groups))}),
    }
    before = [old for old in existing(folder) if old != path]
    for old in before[: 1 - KEPT]:  # first, so that the disk never has to hold more of them
        old.unlink(missing_ok=True)
    write_tensors(path, tensors, metadata)
    return path


def existing(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(folder.glob("step-????????.safetensors"))


def step_of(path: Path) -> int:
    """Return the number of steps taken before a checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that cannot be read, and why."""

    path: Path
    error: str


def restore(
    folder: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer,
    averages: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Any] | None, list[Damaged]]:  # fmt: skip
    """Load the newest checkpoint that is whole into parameters, optimizer and averages.

    Averages that it does not hold, as those of a run without, begin with the parameters.

    Return its position, or None if there is no checkpoint, and the newer ones that are damaged. Raises `UserError` if all
    are damaged.
    """
    damaged: list[Damaged] = []
    for path in reversed(existing(folder)):
        try:
            tensors, metadata = read_tensors(path)
        except UserError as error:
            damaged.append(Damaged(path, str(error)))
            continue
        _load(path, tensors, metadata, parameters, optimizer)
        for name, average in (averages or {}).items():
            average.copy_(tensors.get(f"averages/{name}", tensors[f"parameters/{name}"]))
        return json.loads(metadata["position"]), damaged
    if damaged:
        raise UserError(
            f"{damaged[0].error} To train from the first step again, remove {folder} and resume the run."
        )
    return None, []


def _load(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    own = {k.removeprefix("parameters/"): v for k, v in tensors.items() if k.startswith("parameters/")}
    load_parameters(parameters, own, path)
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            state, _, name = rest.partition("/")
            parameter = parameters[name]
            optimizer.state[parameter][state] = value.to(parameter.device)  # a fused optimizer's steps too
    kept = json.loads(metadata.get("optimizer", "{}"))
    for key, number in kept.get("state", {}).items():
        state, _, name = key.partition("/")
        optimizer.state[parameters[name]][state] = number
    for group, numbers in zip(optimizer.param_groups, kept.get("groups", [])):
        group |= numbers


def _numbers(group: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a parameter group, without its learning rate, which is set in each step."""
    return {key: value for key, value in group.items() if isinstance(value, int | float) and key != "lr"}


def save_best(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Save the current values as the best so far."""
    write_tensors(folder / BEST, parameters)


def best_fault(folder: Path) -> str | None:
    """Return what is wrong with the best weights, or None."""
    try:
        read_tensors(folder / BEST)
    except UserError as error:
        return str(error)
    return None


def load_best(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Restore the best values."""
    load_parameters(parameters, read_tensors(folder / BEST)[0], folder / BEST)


def load_parameters(parameters: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    if set(parameters) != set(tensors):
        raise UserError(
            f"{path} holds different parameters from those that this run trains; it belongs to another recipe."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise UserError(f"{path}: {name!r} has a different shape in this run.")
            parameter.copy_(tensors[name])
