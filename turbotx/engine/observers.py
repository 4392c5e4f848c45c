"""Observers: callbacks that see every call a process compiles, without an import by the engine.

In: functions of an engine, a captured call and its arguments, called before the passes change its
graph. Out: what each of them returns is called with the compiled call::

    observers.append(lambda engine, captured, args, kwargs: print)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Observer = Callable[..., Callable[[Any], object]]

observers: list[Observer] = []
"""In the order in which they are asked."""


def compile_observed(
    engine: Any, captured: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return what the engine compiles a capture to; `observers` look at the call before, and at
    what was made of it after."""
    finishes = [begin(engine, captured, args, kwargs) for begin in observers]
    compiled = engine.compile(captured)
    for finish in finishes:
        finish(compiled)
    return compiled
