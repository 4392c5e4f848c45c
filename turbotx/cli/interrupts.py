"""Interrupts: Ctrl-C ends the process at once, until a command has something to clean up.

In: nothing. Out: a handler of SIGINT; an exception in the middle of PyTorch's import may abort the
process, and before a command begins to work there is nothing to be cleaned up::

    with leaving_when_interrupted(): run_command(argv)
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
"""The exit code of an interrupted process."""


@contextmanager
def leaving_when_interrupted() -> Iterator[None]:
    """End the process at an interrupt, inside the context or until `clean_up_when_interrupted`."""
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, _leave)
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def clean_up_when_interrupted() -> None:
    """Raise KeyboardInterrupt from now on where the process would end."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    os._exit(INTERRUPTED)
