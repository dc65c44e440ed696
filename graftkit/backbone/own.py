"""Users' own modules: a function that returns one, and a safetensors file of its weights."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graftkit.backbone.backbone import Backbone
from graftkit.backbone.memory import is_out_of_memory
from graftkit.errors import UserError, first_line, listing, nearest
from graftkit.files import fault

PICKLE_MARKS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
COUNTER = "num_batches_tracked"  # of BatchNorm: old files lack it, and it does not affect outputs


def call(name: str) -> Backbone | Path:
    """Call `package.module:function` and return its module, as a backbone, or its path of a model folder.

    Modules are also found in the current folder. The function runs with a fixed random seed.
    Raises `UserError` if there is no such function, or it returns something else.
    """
    module_name, _, function = name.partition(":")
    with _current_folder():
        made = _made(name, module_name, function)
    if isinstance(made, nn.Module):
        return Backbone(made, source=name)
    if isinstance(made, Backbone):
        made.source = name
        return made
    if not isinstance(made, str | Path):
        raise UserError(
            f"model {name!r} returned a {type(made).__name__}; it must return an nn.Module, a graftkit.Backbone (a module "
            "with its tokenizer), or the path of a model folder."
        )
    return Path(made)


def _made(name: str, module_name: str, function: str) -> Any:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing a module can raise anything
        raise UserError(
            f"model {name!r}: module {module_name!r} cannot be imported ({first_line(error)}). Install the package "
            "that contains it, put its folder on PYTHONPATH, or run from the folder that it is in."
        ) from None
    if not hasattr(module, function):
        raise UserError(f"model {name!r}: {module_name} has no {function!r}.{nearest(function, dir(module))}")
    called = getattr(module, function)
    if not callable(called):
        raise UserError(
            f"model {name!r}: {function} is a {type(called).__name__}, not a function that returns a model."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return called()
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"model {name!r}: calling {function}() without arguments failed "
            f"({type(error).__name__}: {first_line(error)})."
        ) from None


@contextmanager
def _current_folder() -> Iterator[None]:
    """Also look for modules in the current folder, after all other places, so that it shadows none of them."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def load_weights(module: nn.Module, path: Path, name: str, *, meta: bool = False) -> None:
    """Copy every tensor of a safetensors file into the module that the function `name` returned.

    Parameters and buffers must match the file by name and shape. `meta`: only compare, and copy nothing.
    Raises `UserError` for a file that does not fit, is broken, or is a pickle; the module is then unchanged.
    """
    _refuse_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {
                key: (tuple(file.get_slice(key).get_shape()), file.get_slice(key).get_dtype())
                for key in file.keys()  # noqa: SIM118
            }
            state = module.state_dict()
            _refuse_misfits(state, shapes, path, name)
            _refuse_values(file, {key for key, _ in module.named_parameters()}, path)
            if not meta:
                with torch.no_grad():
                    for key in shapes:
                        state[key].copy_(file.get_tensor(key))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"weights {str(path)!r} are broken or cut short ({error}); restore them from a backup."
        ) from None


def _refuse_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"weights {str(path)!r} is a folder; name the .safetensors file in it.")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
        raise UserError(f"weights {str(path)!r} do not exist.{nearest(path.name, siblings)}")
    with path.open("rb") as file:
        if file.read(4).startswith(PICKLE_MARKS):
            raise UserError(
                f"weights {str(path)!r} are a pickle, which can run any code when it is opened, so graftkit does not "
                "open it. If you trust it, convert it once: safetensors.torch.save_file(torch.load(FILE), "
                "'weights.safetensors')."
            )
    wrong = fault(path)
    if wrong is not None:
        raise UserError(f"weights {str(path)!r} are broken or cut short: the file {wrong}.")


def _refuse_misfits(
    state: dict[str, Tensor], shapes: dict[str, tuple[tuple[int, ...], str]], path: Path, name: str
) -> None:
    """Raise `UserError` for missing, unexpected and misshapen tensors, naming all of them."""
    there = {_place(state[key]) for key in shapes if key in state}
    missing = [
        key for key, tensor in state.items()
        if key not in shapes and _place(tensor) not in there and not key.endswith(COUNTER)
    ]  # fmt: skip
    unexpected = [key for key in shapes if key not in state]
    misshapen = [
        f"{key} is {_text(shape, kind)}, not {_text(tuple(state[key].shape), str(state[key].dtype))}"
        for key, (shape, kind) in shapes.items()
        if key in state
        and (
            shape != tuple(state[key].shape)
            or kind.startswith(("F", "BF")) != state[key].dtype.is_floating_point
        )
    ]
    problems = [
        f"{len(names)} {what} ({listing(names, 4)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(
            f"weights {str(path)!r} do not fit the module of {name!r}: {'; '.join(problems)}. Name the file that "
            "belongs to it, or fix the function."
        )


def _refuse_values(file: Any, parameters: set[str], path: Path) -> None:
    """Raise `UserError` for NaN values, and for infinite parameters (an infinite buffer may be a mask)."""
    for key in file.keys():  # noqa: SIM118
        tensor = file.get_tensor(key)
        if (
            tensor.is_floating_point()
            and not (tensor.isfinite() if key in parameters else ~tensor.isnan()).all()
        ):
            raise UserError(
                f"weights {str(path)!r}: {key!r} contains values that are not finite numbers (NaN or infinity), so neither "
                "are the model's outputs; restore the file from a backup."
            )


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Return where a tensor lies in memory: tied tensors, which a file stores once, have one place."""
    return tensor.data_ptr() or id(tensor), tuple(tensor.shape)


def _text(shape: tuple[int, ...], kind: str) -> str:
    return f"{list(shape)} {kind.removeprefix('torch.')}"
