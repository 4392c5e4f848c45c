"""The capture lock: nothing waits for a whole device while a CUDA graph is captured.

CUDA breaks off a capture, in whatever thread, when the device is synchronized meanwhile. In:
captures, and what has to wait for the device. Out: one of them at a time::

    with capture_lock:
        torch.cuda.synchronize(device)
    capture_lock.when_free(release)     # from a finalizer, which must not wait for a lock

Inside of it neither an arena is leased nor memory given back, so that there is no deadlock:
a holder of a pool may wait for this lock, and not the other way round.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable

from turbotx.errors import TurbotxError


class CaptureLock:
    """A lock that one thread at a time holds, once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._postponed: deque[Callable[[], object]] = deque()

    @property
    def is_held_here(self) -> bool:
        """Whether the current thread holds the lock."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        if self.is_held_here:
            raise TurbotxError(
                "memory was to be given back while this thread captures a CUDA graph, or gives "
                "other memory back: lease arenas before a capture begins"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self._owner = None
        self._lock.release()
        self._catch_up()

    def when_free(self, action: Callable[[], object]) -> None:
        """Call `action` inside of the lock: now, or as soon as its holder is done.

        For finalizers, which run in any thread at any moment: what `action` raises is a warning.
        """
        self._postponed.append(action)
        self._catch_up()

    def _catch_up(self) -> None:
        # Where the lock is taken, its holder comes here after it, and sees what was appended.
        while self._postponed and self._lock.acquire(blocking=False):
            self._owner = threading.get_ident()
            try:
                if self._postponed:  # no other thread was faster
                    self._postponed.popleft()()
            except Exception as error:
                warnings.warn(f"memory could not be given back: {error}", RuntimeWarning)
            finally:
                self._owner = None
                self._lock.release()


capture_lock = CaptureLock()
