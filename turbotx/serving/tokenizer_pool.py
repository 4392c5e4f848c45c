"""Tokenizer pool: threads that tokenize, with a limit on the waiting characters.

In: a function and the number of characters it reads. Out: its result, or Busy. Short texts have
their own thread and do not wait for long ones; what is done sooner than it would be handed to a
thread and back runs on the event loop::

    rows = await pool.run(len(text), lambda: [tokenizer.encode(text)])
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from turbotx.serving.refusals import Busy

Result = TypeVar("Result")
SHORT = 4_096  # characters: a few ms
INLINE = 256  # characters: less than 0.1 ms


class TokenizerPool:
    """Threads that tokenize; used from one event loop."""

    def __init__(self, threads: int, most_characters: int) -> None:
        """most_characters: limit in progress and waiting, besides one request of any length."""
        self._long = ThreadPoolExecutor(threads, thread_name_prefix="turbotx-tokenizer")
        self._short = ThreadPoolExecutor(1, thread_name_prefix="turbotx-tokenizer-short")
        self._most = most_characters
        self.characters = 0  # in progress or waiting

    async def run(self, characters: int, work: Callable[[], Result]) -> Result:
        """Run `work` in a thread. Raises Busy if too many characters wait, and what `work`
        raises."""
        if self.characters and self.characters + characters > self._most:
            raise Busy("too much text waits to be tokenized: retry later", retry_after_s=1.0)
        if characters <= INLINE:
            return work()
        self.characters += characters
        pool = self._short if characters <= SHORT else self._long
        try:
            running = pool.submit(work)
        except BaseException:
            self.characters -= characters
            raise
        loop = asyncio.get_running_loop()

        def forget(_: object) -> None:  # also after the client disconnected: the work goes on
            self.characters -= characters

        def done(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(forget, None)

        running.add_done_callback(done)
        return await asyncio.wrap_future(running)

    def shutdown(self) -> None:
        """End the threads after their submitted work."""
        self._long.shutdown(wait=True)
        self._short.shutdown(wait=True)
