"""Quiet: silences what PyTorch logs about traces that fail or are retried.

In: nothing. Out: a context in which PyTorch's loggers drop this thread's warnings and errors;
turbotx's own error reports the problem. If TORCH_LOGS is set, nothing is dropped::

    with quiet_torch():
        torch.export.export(...)
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Loggers that may not exist yet when a trace begins.
_NAMES = (
    "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes",
    "torch.fx.experimental.proxy_tensor", "torch.fx.experimental.recording",
    "torch.utils._sympy.interp", "torch.utils._sympy.value_ranges", "torch.export",
    "torch.export._trace", "torch.export._draft_export", "torch._export.non_strict_utils",
    "torch._export.converter", "torch._functorch", "torch._dynamo", "torch._ops",
)  # fmt: skip


class _OfThisThread(logging.Filter):
    """Drops the warnings and errors of the threads that are tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.depths: dict[int, int] = {}
        self.loggers: list[logging.Logger] = []

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or record.thread not in self.depths

    def enter(self) -> None:
        with self.lock:
            if not self.depths:
                for name in _NAMES:
                    logging.getLogger(name)
                known = logging.root.manager.loggerDict
                named = [known[n] for n in known if n == "torch" or n.startswith("torch.")]
                self.loggers = [x for x in named if isinstance(x, logging.Logger)]
                for logger in self.loggers:
                    logger.addFilter(self)
            thread = threading.get_ident()
            self.depths[thread] = self.depths.get(thread, 0) + 1

    def leave(self) -> None:
        with self.lock:
            thread = threading.get_ident()
            self.depths[thread] -= 1
            if not self.depths[thread]:
                del self.depths[thread]
            if not self.depths:
                for logger in self.loggers:
                    logger.removeFilter(self)
                self.loggers = []


_filter = _OfThisThread()


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Context manager: suppress PyTorch's log messages in this thread, including warnings and
    errors."""
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    _filter.enter()
    try:
        yield
    finally:
        _filter.leave()
