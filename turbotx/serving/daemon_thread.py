"""A thread that does not keep the process: what takes long at a start.

In: work. Out: its result, in the event loop; who is told to stop need not wait for it::

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
    """Return what the work returns, or raise what it raises; `ended` is called in the loop then,
    also where nobody awaits it any more."""
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
        with contextlib.suppress(RuntimeError):  # the loop was left meanwhile
            loop.call_soon_threadsafe(finish, found, error)

    threading.Thread(target=run, name="turbotx-start", daemon=True).start()
    return await done
