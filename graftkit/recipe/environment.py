"""Environment variables: which of several processes this is, as `torchrun` sets them, and the cache folder. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graftkit.errors import UserError, shown

LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": -1, "LOCAL_WORLD_SIZE": 1}  # -1: a process alone
UNSET = "Unset it, or start the processes with torchrun or accelerate launch, which set it"


def cache_folder() -> Path:
    """Return the folder for what can be computed again: GRAFTKIT_CACHE, or ~/.cache/graftkit."""
    return Path(os.environ.get("GRAFTKIT_CACHE") or "~/.cache/graftkit").expanduser()


def forecasts() -> bool:
    """Return whether runs forecast their memory and time: not with GRAFTKIT_FORECAST=0."""
    return os.environ.get("GRAFTKIT_FORECAST", "1") != "0"


@contextmanager
def without_forecasts() -> Iterator[None]:
    """Make no forecasts meanwhile, as of the runs of a comparison, which are measured together beforehand."""
    before = os.environ.get("GRAFTKIT_FORECAST")
    os.environ["GRAFTKIT_FORECAST"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRAFTKIT_FORECAST"]
        else:
            os.environ["GRAFTKIT_FORECAST"] = before


def check_processes() -> None:
    """Raise `UserError` for numbers of processes that cannot be: otherwise they would wait for others forever."""
    found = {name: _number(name) for name in LEAST if os.environ.get(name, "") != ""}
    world = found.get("WORLD_SIZE", 1)
    for name in ("RANK", "LOCAL_RANK"):
        if found.get(name, 0) >= world > 1:
            raise UserError(
                f"environment variable {name} is {found[name]}, but WORLD_SIZE is {world}, so it can be at most "
                f"{world - 1}. {UNSET}."
            )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and not os.environ.get(name):
            raise UserError(
                f"environment variable WORLD_SIZE is {world}, but {name} is not set. {UNSET.replace(' it', ' all of them')}."
            )


def are_several() -> bool:
    """Return whether this is one of several processes. Raises `UserError` for a number that cannot be."""
    return _number("WORLD_SIZE") > 1


def is_first() -> bool:
    """Return whether this is the first of several processes, or the only one."""
    try:
        return _number("RANK") == 0 or _number("WORLD_SIZE") == 1
    except UserError:
        return True


def _number(name: str) -> int:
    text = os.environ.get(name) or str(max(LEAST[name], 0))
    try:
        value = int(text)
    except ValueError:
        value = LEAST[name] - 1
    if value < LEAST[name]:
        raise UserError(
            f"environment variable {name} is {shown(text)}, but must be a whole number of at least {LEAST[name]}. {UNSET}."
        )
    return value
