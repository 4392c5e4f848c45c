"""Work that callbacks end with an error of theirs."""

from __future__ import annotations

import asyncio
import sys

import pytest

from turbotx.serving.interruption import Interruption


class TooLate(Exception):
    pass


def test_work_that_waits_too_long_ends_with_the_given_error_and_cleans_up():
    cleaned = []

    async def late():
        with Interruption() as waiting:
            waiting.end_after(0.01, TooLate())
            try:
                await asyncio.sleep(60)
            finally:
                cleaned.append(True)

    async def life():
        with pytest.raises(TooLate):
            await late()
        await asyncio.sleep(0)  # nothing of the cancellation is left
        return "alive"

    assert asyncio.run(life()) == "alive" and cleaned == [True]


def test_work_that_does_not_wait_is_not_ended_and_nothing_follows_it():
    async def life():
        with Interruption() as waiting:
            waiting.end_after(0, TooLate())
        waiting.end(TooLate())
        await asyncio.sleep(0.01)
        return "whole"

    assert asyncio.run(life()) == "whole"


def test_errors_of_the_work_pass_and_the_first_end_counts():
    async def failing():
        with Interruption() as waiting:
            waiting.end_after(60, TooLate())
            raise ValueError("its own")

    async def ended():
        loop = asyncio.get_running_loop()
        with Interruption() as waiting:
            loop.call_soon(waiting.end, TooLate("first"))
            loop.call_soon(waiting.end, TooLate("second"))
            await asyncio.sleep(60)

    async def life():
        with pytest.raises(ValueError, match="its own"):
            await failing()
        with pytest.raises(TooLate, match="first"):
            await ended()

    asyncio.run(life())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tasks do not count who cancels them")
def test_a_task_that_others_cancel_meanwhile_is_cancelled():
    async def work():
        with Interruption() as waiting:
            asyncio.get_running_loop().call_soon(waiting.end, TooLate())
            asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
            await asyncio.sleep(60)

    async def life():
        task = asyncio.create_task(work())
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(life())
