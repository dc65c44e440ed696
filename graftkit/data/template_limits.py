"""Limits on chat templates, which are programs that come with a model: of time and memory, and of what they may compute."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 2.0  # for one conversation, which takes milliseconds
MEMORY = 2**30  # bytes, for the same; it takes some kilobytes
LONGEST = 10_000_000  # characters of a rendered conversation


ONE = threading.Lock()  # the limit of memory is that of the process, so threads take turns


class TooLong(Exception):
    """The time is over."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise `TooLong` in the block after `SECONDS`, and `MemoryError` (on Linux) if it takes more than `MEMORY` more."""
    in_time = _alarmed() if threading.current_thread() is threading.main_thread() else _interrupted()
    with ONE, _limited_memory(), in_time:
        yield


@contextmanager
def _alarmed() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _interrupted() -> Iterator[None]:
    """The same for threads that no signal reaches: a timer has Python raise the exception in this one."""
    this, lock, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(this, ctypes.py_object(TooLong))

    timer = threading.Timer(SECONDS, stop)
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
        timer.cancel()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(this, None)  # if it has not been raised yet


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Limit the address space of this process: one expression of a template can ask for any number of bytes at once."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def has_power(template: str) -> bool:
    """Return whether a template raises something to a power: `{{ 9**9**9 }}` cannot be interrupted."""
    from jinja2 import Environment, TemplateSyntaxError

    if "**" not in template:
        return False
    before = ""
    try:
        for _, kind, text in Environment().lex(template):
            if kind == "whitespace":
                continue
            if kind == "operator" and text == "**" and before not in ("(", ","):  # and not f(**options)
                return True
            before = text
    except TemplateSyntaxError:  # reported when it is rendered
        pass
    return False
