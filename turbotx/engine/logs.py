"""Logs: messages of each stage on standard error, enabled by TURBOTX_LOGS.

In: `TURBOTX_LOGS=capture,memory`. Out: the loggers `turbotx.capture` and `turbotx.memory` at DEBUG,
each with a handler. All are ordinary `logging` loggers below `turbotx`::

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
"""The names that TURBOTX_LOGS accepts, besides `all`."""


def read_logs() -> None:
    """Enable the logs that TURBOTX_LOGS names; raise OptionsError for an unknown name."""
    show_logs(os.environ.get("TURBOTX_LOGS", ""))


@functools.cache
def show_logs(text: str) -> None:
    """Enable the logs that `text` names, separated by commas; once per text. Raises OptionsError
    for an unknown name."""
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
        logger.propagate = False  # a handler of the application would print it twice
