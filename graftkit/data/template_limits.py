"""Limits on chat templates, which are programs that come with a model: of time, and of what they may compute."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 2.0  # for one conversation, which takes milliseconds
LONGEST = 10_000_000  # characters of a rendered conversation


class TooLong(Exception):
    """The time is over."""


@contextmanager
def limited_time() -> Iterator[None]:
    """Raise `TooLong` in the block after `SECONDS`. Only the main thread can be interrupted; others have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


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
