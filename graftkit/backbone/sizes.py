"""Refuse a config.json that its weights cannot fill, before anything of that size is built or allocated.

A small file can describe a model of any size. What a model may hold follows from the headers of its weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from graftkit.backbone.folder import CONFIG, PREPROCESSOR_FILE, config_of, weights_files
from graftkit.errors import UserError, listing, shown
from graftkit.files import read_json, read_shapes

# numbers of things that a model, or its config, is built from one by one; not `output_layer`, `layer_norm_eps`
COUNT = re.compile(
    r"^(num|n)_?\w*(layer|block|stage|expert|group|level|head)s?$|(layer|block|stage)s$|^depths?$"
)
LABELS = re.compile(r"^_?num_labels$")
SIZE = re.compile(
    r"(^|_)(size|dim|width|channels|embd|inner)s?$|^d_\w+$|^vocab_size$|^max_position_embeddings$"
)
MOST_COUNT, MOST_LABELS, MOST_SIZE = 1_000, 2**21, 2**26  # accepted with any weights
# the largest inputs that are accepted, by the last part of their name: pixels of a side, bands, hertz; then all others
MOST_INPUTS = {"size|height|width|edge|crop|pad$": 2**13, "bins|bands|feature_size": 2**12, "rate": 2**20}
MOST_INPUT = 2**28  # samples, frames, pixels of an image
# a repository named there is code that would be run
CODE = re.compile(r"(attn|experts)_implementation")
# other weights, which timm would open
LOADERS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
SPARE_CALLS, SPARE_VALUES = 4_000, 2**26  # for heads and other parts that weights may lack


@dataclass(frozen=True)
class Capacity:
    """What the weights of a folder hold: their number of tensors, and of values (integers may be packed)."""

    tensors: int
    values: int


def capacity_of(folder: Path) -> Capacity:
    """Return what a folder's weights hold, from the headers of its files."""
    entries = [entry for path in weights_files(folder) for entry in read_shapes(path).values()]
    packed = {kind: 1 if kind.startswith(("F", "BF")) else 16 for kind, _ in entries}  # 2 bits in an int32
    return Capacity(len(entries), sum(math.prod(shape) * packed[kind] for kind, shape in entries))


def refuse_impossible(folder: Path, config: dict[str, Any]) -> None:
    """Raise `UserError` for numbers in config.json that no model with the folder's weights can have.

    Its class, and transformers, loop over some of these numbers before there is a model.
    """
    path, capacity = folder / CONFIG, capacity_of(folder)
    if not isinstance(config.get("model_type", ""), str):
        raise UserError(f"{path}: model_type is {config['model_type']!r}, but must be a text.")
    labels = config.get("id2label", {})
    if not isinstance(labels, dict) or not all(
        index.isdecimal() and isinstance(label, str) for index, label in labels.items()
    ):
        raise UserError(f"{path}: id2label is {shown(labels, 40)}, but must give a text for each number.")
    for name, key, value in _entries(config):
        if (key in LOADERS and value) or (key == "architecture" and ":" in str(value)):
            raise UserError(f"{path}: {name} is {shown(value, 40)}, which names other weights; remove it.")
        if CODE.search(key) and "/" in str(value):
            raise UserError(f"{path}: {name} is {shown(value, 40)}, which names code of others; remove it.")
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{path}: {name} is NaN, but must be a number.")
        most = _most(key, capacity)
        if most is None:
            continue
        if not isinstance(value, int) and (key != "depth" or isinstance(value, str)):
            raise UserError(f"{path}: {name} is {shown(value, 40)}, but must be a whole number.")
        if value < 0 and key != "max_position_embeddings":  # XLNet says -1 for any number
            raise UserError(f"{path}: {name} is {shown(value, 40)}, but must not be negative.")
        if value > most:
            raise UserError(
                f"{path}: {name} is {shown(value, 40)}, but the weights have {capacity.tensors:,} tensors with "
                f"{capacity.values:,} values; config.json and weights do not belong together."
            )


def refuse_impossible_inputs(folder: Path) -> None:
    """Raise `UserError` for numbers in preprocessor_config.json that no images or sounds have, as each row gets that size."""
    path = folder / PREPROCESSOR_FILE
    if not path.exists():
        return
    config = read_json(path)
    counted = "merge_size" in config  # such processors limit the pixels of an image by `longest_edge`
    for name, key, value in _entries(config):
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{path}: {name} is NaN, but must be a number.")
        most = next((most for pattern, most in MOST_INPUTS.items() if re.search(pattern, key)), MOST_INPUT)
        most = MOST_INPUT if counted and "edge" in key else most
        if isinstance(value, int | float) and abs(value) > most:
            raise UserError(
                f"{path}: {name} is {shown(value, 40)}, more than any model takes (at most {most:,}); download the file again."
            )


def _most(key: str, capacity: Capacity) -> int | None:
    """Return the highest value that a key can have with these weights; None if it is not a size."""
    if LABELS.search(key):
        return MOST_LABELS
    if COUNT.search(key):
        return max(MOST_COUNT, capacity.tensors)
    return max(MOST_SIZE, capacity.values) if SIZE.search(key) else None


def _entries(value: Any, name: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield the dotted name, the last key and the value of each plain entry of a config, also of lists and objects."""
    if isinstance(value, dict):
        for part, entry in value.items():
            yield from _entries(entry, f"{name}.{part}".lstrip("."), part)
    elif isinstance(value, list):
        for entry in value[:MOST_COUNT]:
            yield from _entries(entry, name, key)
    else:
        yield name, key, value


class Allowance(TorchFunctionMode):
    """Within the `with` block, count the tensors and values that torch makes in this thread, on whatever device.

    `refuse(shape)` returns the error to raise when they exceed the allowance; nothing was allocated for the last of them.
    """

    def __init__(self, calls: int, values: int, refuse: Callable[[tuple[int, ...]], UserError]) -> None:
        super().__init__()
        self.calls, self.values, self.refuse = calls, values, refuse

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in MAKERS:
            shape = _shape(args, kwargs)
            self.calls -= 1
            self.values -= math.prod(shape)
            if self.calls < 0 or self.values < 0:
                raise self.refuse(shape)
        return function(*args, **kwargs)


def _shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, ...]:
    given = kwargs.get("size", args[0] if args and isinstance(args[0], list | tuple) else args)
    return tuple(size for size in given if isinstance(size, int))


def allowance_for(folder: Path) -> Allowance:
    """Return how much may be built for a model: not much more than its weights hold."""
    capacity = capacity_of(folder)

    def refuse(shape: tuple[int, ...]) -> UserError:
        sizes = {name: value for name, key, value in _entries(config_of(folder))
                 if isinstance(value, int) and not isinstance(value, bool) and _most(key, capacity)}  # fmt: skip
        largest = sorted(sizes, key=lambda name: -sizes[name])
        return UserError(
            f"{folder / CONFIG} describes a larger model than its weights, which have {capacity.tensors:,} tensors with "
            f"{capacity.values:,} values (the largest numbers are {listing((f'{n}={sizes[n]}' for n in largest), 4)}); "
            "config.json and weights do not belong together."
        )

    return Allowance(SPARE_CALLS + 8 * capacity.tensors, SPARE_VALUES + 4 * capacity.values, refuse)
