"""Commands in two processes that work together, as torchrun starts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from types import SimpleNamespace

from accelerate import PartialState
from conftest import forked

from graftkit.cli.main import main


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def both(work: Callable[[int], object]) -> list[SimpleNamespace]:
    """Call `work(rank)` in two processes with the variables that torchrun sets."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def one(rank: int) -> None:
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        PartialState._reset_state()  # which says that this process is the only one
        work(rank)

    return forked(lambda: one(0), lambda: one(1))


def together(*words: str) -> list[SimpleNamespace]:
    """`graftkit ...` in two such processes."""
    return both(lambda rank: main(list(words)))
