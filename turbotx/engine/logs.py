"""Logs: what a stage does, on standard error, where TURBOTX_LOGS asks for it.

In: `TURBOTX_LOGS=capture,memory`. Out: the loggers `turbotx.capture` and `turbotx.memory` at DEBUG
with a handler of their own; all are ordinary loggers of Python's `logging` below `turbotx`::

    turbotx.memory: planned 32 buffers at batch 2, seq 16: 288.1 KiB
"""

from __future__ import annotations

import difflib
import functools
import logging
import os

from turbotx.errors import OptionsError

TOPICS = {
    "capture": "every trace, and why a call is captured anew",
    "guards": "what of a model changed since a capture",
    "fusion": "what each region became, and why it took more than one kernel",
    "memory": "every plan, and every growth of an arena",
    "build": "every shared object, compiled or found in the cache",
    "serving": "what the server does",
}
"""The names that TURBOTX_LOGS takes, beside `all`."""


def read_logs() -> None:
    """Turn on what TURBOTX_LOGS names; raise OptionsError for a name that is none."""
    show_logs(os.environ.get("TURBOTX_LOGS", ""))


@functools.cache
def show_logs(text: str) -> None:
    """Turn on the logs that `text` names, separated by commas; once for each text. Raises
    OptionsError for an unknown name."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in TOPICS and name != "all":
            near = difflib.get_close_matches(name, TOPICS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"write all, or {', '.join(TOPICS)}"
            raise OptionsError(f"TURBOTX_LOGS={text}: there is no log {name!r}: {hint}")
    for name in TOPICS if "all" in names else names:
        logger, handler = logging.getLogger(f"turbotx.{name}"), logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False  # a handler of the program's own would say it twice
