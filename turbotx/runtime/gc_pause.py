"""GC pause: suspends Python's cyclic garbage collector where it is slow or harmful.

A trace makes a million objects, all alive, which a collection would walk again and again; and one
in the middle of a CUDA graph's capture could destroy another graph. For example::

    with pause_collection():
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

    The last of several pauses that overlap, in one thread or many, turns it on again.
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
