"""Daemon thread: runs slow start-up work without blocking the process's exit.

In: a function. Out: an awaitable of its result; the process may exit while the thread still runs::

    table = await run_in_daemon_thread(measure, ended=lambda: None)
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def run_in_daemon_thread(work: Callable[[], Result], ended: Callable[[], object]) -> Result:
    """Return the result of `work`, run in a daemon thread, or raise its exception.

    ended: called in the event loop when the work ends, also if this coroutine was cancelled
    before."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def finish(found: Result | None, error: BaseException | None) -> None:
        ended()
        if done.done():
            return
        if error is None:
            done.set_result(found)  # type: ignore[arg-type]
        else:
            done.set_exception(error)

    def run() -> None:
        found, error = None, None
        try:
            found = work()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the event loop has been closed
            loop.call_soon_threadsafe(finish, found, error)

    threading.Thread(target=run, name="turbotx-start", daemon=True).start()
    return await done
