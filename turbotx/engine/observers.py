"""Observers: callbacks that see every call that the process compiles.

In: functions called with the engine, the captured call and its arguments before the passes change
the graph. Out: each returns a function that is called with the compiled call::

    observers.append(lambda engine, captured, args, kwargs: print)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Observer = Callable[..., Callable[[Any], object]]

observers: list[Observer] = []
"""Called in this order."""


def compile_observed(
    engine: Any, captured: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Compile a capture; call the `observers` before, and the functions that they return after.
    Returns the compiled call."""
    finishes = [begin(engine, captured, args, kwargs) for begin in observers]
    compiled = engine.compile(captured)
    for finish in finishes:
        finish(compiled)
    return compiled
