"""The capture lock: no device is synchronized while a CUDA graph is being captured.

CUDA aborts a capture in any thread if the device is synchronized during it. In: captures and
operations that synchronize the device. Out: they run one at a time::

    with capture_lock:
        torch.cuda.synchronize(device)
    capture_lock.when_free(release)     # from a finalizer, which must not wait for a lock

To avoid deadlocks, arenas are neither leased nor returned while it is held: a holder of a pool may
wait for this lock, but not the other way round.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable

from turbotx.errors import TurbotxError


class CaptureLock:
    """A non-reentrant lock that knows its owner."""

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
        """Call `action` under the lock: now, or as soon as its holder releases it.

        For finalizers, which run in any thread at any time: an exception from `action` becomes a
        warning.
        """
        self._postponed.append(action)
        self._catch_up()

    def _catch_up(self) -> None:
        # If the lock is held, its holder calls this after releasing it, and sees what was appended.
        while self._postponed and self._lock.acquire(blocking=False):
            self._owner = threading.get_ident()
            try:
                if self._postponed:  # another thread may have been faster
                    self._postponed.popleft()()
            except Exception as error:
                warnings.warn(f"memory could not be given back: {error}", RuntimeWarning)
            finally:
                self._owner = None
                self._lock.release()


capture_lock = CaptureLock()
