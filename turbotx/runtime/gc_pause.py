"""GC pause: suspends Python's cyclic garbage collector where it is slow or harmful.

In: code that creates a million live objects, which every collection would traverse, as a trace
does, or during which no CUDA graph may be destroyed. Out: it runs without collections::

    with pause_gc():
        captured = capture(model, args, kwargs)
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_pauses = 0
_was_enabled = False


@contextmanager
def pause_gc() -> Iterator[None]:
    """Suspend cyclic garbage collection in all threads, inside the context.

    With overlapping pauses, in one or several threads, the last one re-enables it.
    """
    global _pauses, _was_enabled
    with _lock:
        if _pauses == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if _pauses == 0 and _was_enabled:
                gc.enable()
