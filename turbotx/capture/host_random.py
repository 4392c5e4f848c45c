"""Host random: numbers that forward draws outside of PyTorch, which a trace would keep for good.

In: a function that runs the model's Python code. Out: where it drew from Python's `random` or from
NumPy's global generator; "" where it did not, for example::

    find_draws(lambda: model(x))  ->  "random.random at model.py:12"
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def look_at_generators() -> tuple[Any, Any]:
    """Return the states of Python's and of NumPy's global generator, to be compared."""
    numpy = sys.modules.get("numpy.random")
    if numpy is None:
        return random.getstate(), None
    state = numpy.get_state()
    return random.getstate(), (state[0], state[1].tobytes(), *state[2:])


def find_draws(run: Callable[[], object]) -> str:
    """Call `run` and return what it drew from, and where in Python's case; "" for nothing.

    Of Python's generators this thread's draws alone count. NumPy's global one moves for all
    threads. Errors of `run` are its own.
    """
    found: list[str] = []

    def look(frame: FrameType, event: str, called: Any) -> None:
        owner = getattr(called, "__self__", None)
        if event != "c_call" or found or not isinstance(owner, random.Random):
            return
        caller: FrameType | None = frame
        while caller is not None and caller.f_code.co_filename == random.__file__:
            caller = caller.f_back
        if caller is not None:
            place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            found.append(f"Python's random at {place}")

    before, profiler = look_at_generators()[1], sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(profiler)
    if not found and look_at_generators()[1] != before:
        found.append("numpy.random")
    return found[0] if found else ""
