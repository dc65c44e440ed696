"""Work in a process of its own that begins as a copy of this one.

It has what was imported and read here already, shares its memory until one of them changes it, and has threads, a peak of
memory and an end of its own. Only on Linux, and only on machines without an accelerator: what has begun to use one, be it torch's
backward pass alone, cannot go on in a copy.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from graftkit.errors import Interrupted, Note, UserError

LOOK = 1.0  # seconds between looks at whether the first process is still there


def can_fork() -> bool:
    """Return whether work can be done in copies of this process."""
    return sys.platform == "linux" and not torch.accelerator.is_available()


@dataclass(frozen=True)
class Answer:
    """What became of the work: `done`, its value; or `mistake`, the message of its `UserError`; or `failure`, the traceback of
    another error; or `interrupted`; or `killed`, the signal that ended its process. `notes`: what it warned of; `modules`: names of
    those that it imported."""

    done: Any = None
    mistake: str | None = None
    failure: str | None = None
    interrupted: bool = False
    killed: int | None = None
    notes: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


class Forked:
    """A process that does some work, with so many threads. The work returns plain values."""

    def __init__(self, work: Callable[[], Any], threads: int) -> None:
        """Begin. Raises `UserError` if the system has no room for another process."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # what is left in it would be printed twice
        self.process, self.wrong = -1, ""
        self.reader, writer = os.pipe()
        # In a new thread: OpenMP's pool of threads belongs to the thread that used it, and a copy would wait for them forever.
        thread = threading.Thread(target=self._begin, args=(work, threads, writer))
        thread.start()
        thread.join()
        os.close(writer)
        if self.process < 0:
            os.close(self.reader)
            raise UserError(f"no process could be started: {self.wrong}; free some memory and try again.")

    def _begin(self, work: Callable[[], Any], threads: int, writer: int) -> None:
        parent = os.getpid()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: there are other threads
                self.process = os.fork()
        except OSError as error:
            self.wrong = error.strerror or str(error)
            return
        if self.process == 0:
            try:
                os.close(self.reader)
                _settle(threads, parent)
                content = json.dumps(_answer(work)).encode()
                while content:
                    content = content[os.write(writer, content) :]
            finally:
                os._exit(0)  # nothing of the first process is cleaned up here

    def answer(self) -> Answer:
        """Wait for the end of the process, and return its answer."""
        parts = []
        while part := os.read(self.reader, 1 << 16):
            parts.append(part)
        os.close(self.reader)
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        if not parts or code:
            return Answer(killed=-code if code < 0 else signal.SIGKILL)
        return Answer(**json.loads(b"".join(parts)))

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send the process a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.process, number)


def _settle(threads: int, parent: int) -> None:
    """Make a copy a process of its own."""
    with suppress(OSError):
        os.setpgid(0, 0)  # Ctrl-C goes to the first process, which decides
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    os.dup2(2, 1)  # whatever libraries print is no result
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # their threads are not in the copy
    gc.freeze()  # looking through what was there before would copy it
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Stop as on Ctrl-C when the first process is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)


def _answer(work: Callable[[], Any]) -> dict[str, Any]:
    notes: list[str] = []
    known = set(sys.modules)

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Note):
            notes.append(str(message))
        else:
            plain(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        plain, warnings.showwarning = warnings.showwarning, show
        try:
            found: dict[str, Any] = {"done": work()}
        except UserError as error:
            found = {"mistake": str(error)}
        except (Interrupted, KeyboardInterrupt):
            found = {"interrupted": True}
        except BaseException:
            found = {"failure": traceback.format_exc()}
    modules = [name for name, module in sys.modules.items() if name not in known and _has_file(module)]
    return found | {"notes": notes, "modules": modules}


def _has_file(module: Any) -> bool:
    return getattr(getattr(module, "__spec__", None), "has_location", False) is True


def import_here(modules: list[str]) -> None:
    """Import what a copy has imported, so that later copies need not: that takes seconds for some libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            if name not in sys.modules:
                with suppress(Exception):  # it may be of the copy alone
                    importlib.import_module(name)
