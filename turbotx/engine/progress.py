"""Progress: shows the stage of a first call on a terminal if it takes longer than two seconds.

In: the name of the next stage. Out: a line with a spinner on standard error, removed at the end.
Nothing if standard error is not a terminal or the logger `turbotx` is silenced::

    with show_progress("capture BertModel") as step:
        ...
        step("compile BertModel")
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

AFTER_S = 2.0
log = logging.getLogger("turbotx")
_hidden = 0


@contextmanager
def hide_progress() -> Iterator[None]:
    """Suppress progress lines of all threads inside the context: the caller shows its own."""
    global _hidden
    _hidden += 1
    try:
        yield
    finally:
        _hidden -= 1


@contextmanager
def show_progress(first: str, after_s: float = AFTER_S) -> Iterator[Callable[[str], None]]:
    """Show `first`, then each text passed to the yielded function, while the block runs."""
    if _hidden or not log.isEnabledFor(logging.WARNING) or not sys.stderr.isatty():
        yield lambda text: None
        return
    line = _Line(first)
    timer = threading.Timer(after_s, line.begin)
    timer.daemon = True
    timer.start()
    try:
        yield line.say
    finally:
        timer.cancel()
        line.end()


class _Line:
    """A line shown by a timer and removed when the call ends; either may come first."""

    def __init__(self, text: str) -> None:
        self._text, self._lock, self._ended = text, threading.Lock(), False
        self._status: Any = None

    def begin(self) -> None:
        from rich.console import Console  # takes 0.1 s, which short calls do not need

        with self._lock:
            if not self._ended:
                self._status = Console(stderr=True).status(f"turbotx: {self._text}")
                self._status.start()

    def say(self, text: str) -> None:
        with self._lock:
            self._text = text
            if self._status is not None:
                self._status.update(f"turbotx: {text}")

    def end(self) -> None:
        with self._lock:
            self._ended = True
            if self._status is not None:
                self._status.stop()
