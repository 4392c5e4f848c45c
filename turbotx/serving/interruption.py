"""Interruption: ends what a task awaits with an error of one's own, without a task for it.

In: work inside of a context, callbacks outside. Out: the work's result, or the first error that a
callback gave. Work that never waits costs no more than entering the context::

    with Interruption() as waiting:
        waiting.end_after(30.0, TimedOut("too late"))
        return await work
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any


class Interruption:
    """A context of the current task; as ``asyncio.timeout``, which Python 3.10 lacks, for any
    error."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "an interruption needs a task"
        self._task: Any = task
        self._error: Exception | None = None
        self._handles: list[asyncio.Handle] = []
        self._over = False

    def __enter__(self) -> Interruption:
        cancelling = getattr(self._task, "cancelling", None)  # Python 3.11
        self._before = cancelling() if cancelling is not None else 0
        return self

    def end(self, error: Exception) -> None:
        """Cancel the work, which waits, and let the context raise `error`. The first one counts;
        after the context there is no effect. Not for the work itself, which can raise."""
        if self._error is None and not self._over:
            self._error = error
            self._task.cancel()

    def end_after(self, seconds: float, error: Exception) -> None:
        """Call `end` if the work takes longer than `seconds`; 0: if it waits at all."""
        loop = asyncio.get_running_loop()
        self._handles.append(loop.call_later(seconds, self.end, error))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._over = True
        for handle in self._handles:
            handle.cancel()
        if self._error is None:
            return
        uncancel = getattr(self._task, "uncancel", None)
        if uncancel is not None and uncancel() > self._before:
            return  # somebody else cancels the task
        if kind is asyncio.CancelledError:
            raise self._error from None
