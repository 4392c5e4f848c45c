"""Host random: finds random numbers drawn outside PyTorch, which a trace would freeze.

In: a function that runs the model's Python code. Out: where it drew from Python's `random`, NumPy,
or a generator of the user's own; "" if it did not, for example::

    find_draws(lambda: model(x))  ->  "Python's random at model.py:12"
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch

from turbotx.capture.module_state.values import is_users
from turbotx.errors import CaptureError

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


_GLOBAL = (random.getstate.__self__, np.random.get_state.__self__)  # type: ignore[attr-defined]


def is_own_generator(value: Any) -> bool:
    """Return whether an object is a generator other than those of `look_at_generators`."""
    return isinstance(value, GENERATORS) and not any(value is g for g in _GLOBAL)


def look_at_generators() -> tuple[Any, Any]:
    """Return the states of Python's and NumPy's global generators, for comparison."""
    state: Any = np.random.get_state()
    return random.getstate(), (state[0], state[1].tobytes(), *state[2:])


def look_at(generator: Any) -> str | None:
    """Return the state of one of `GENERATORS`, for comparison; None if it has none."""
    try:
        if isinstance(generator, random.Random):
            return repr(generator.getstate())
        numbers = generator if isinstance(generator, np.random.RandomState) else None
        bits = numbers._bit_generator if numbers is not None else generator.bit_generator
        with np.printoptions(threshold=sys.maxsize):
            return repr(bits.state)
    except (AttributeError, NotImplementedError):
        return None


def find_draws(run: Callable[[], object], generators: Sequence[Any] = ()) -> str:
    """Call `run` and return which generator it drew from, for Python's with the source line; "" if
    none.

    generators: the user's own, which `run` may use. Only this thread's draws from Python's
    generators count; NumPy's are shared by all threads. Exceptions of `run` are passed on.
    """
    found: list[str] = []

    def look(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            owner = getattr(called, "__self__", None)
        elif event == "call" and frame.f_code.co_filename == random.__file__:
            owner = frame.f_locals.get("self")  # SystemRandom's methods are written in Python
        else:
            return
        if found or not isinstance(owner, random.Random):
            return
        caller: FrameType | None = frame
        while caller is not None and caller.f_code.co_filename == random.__file__:
            caller = caller.f_back
        # sympy, which holds the sizes of a trace, shuffles the facts that it checks.
        if caller is not None and _package(caller) != "sympy":
            found.append(f"Python's random at {caller.f_code.co_filename}:{caller.f_lineno}")

    numpys = [g for g in generators if not isinstance(g, random.Random)]
    before, profiler = [look_at_generators()[1], *map(look_at, numpys)], sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(profiler)
    if not found and [look_at_generators()[1], *map(look_at, numpys)] != before:
        found.append("numpy.random")
    return found[0] if found else ""


class _Noting:
    """PyTorch's default generator, with a callback on every attribute access."""

    def __init__(self, generator: torch.Generator, note: Callable[[], None]) -> None:
        self._generator, self._note = generator, note

    def __getattr__(self, name: str) -> Any:
        self._note()
        return getattr(self._generator, name)


@contextmanager
def refuse_seeding() -> Iterator[None]:
    """Context manager: raise CaptureError if user code in this thread seeds PyTorch's default
    generator or reads its state, since programs draw from that generator directly."""
    owner = threading.get_ident()

    def note() -> None:
        frame = _find_asker(_SEEDERS)
        if frame is not None and threading.get_ident() == owner:
            raise CaptureError(
                f"its code at {frame.f_code.co_filename}:{frame.f_lineno} sets or reads the "
                "seed or the state of PyTorch's random generator, which a compiled program cannot "
                "do: do it outside of the optimized module"
            )

    noting: Any = _Noting(torch.default_generator, note)
    with (
        mock.patch.object(torch.random, "default_generator", noting),
        mock.patch.object(torch, "default_generator", noting),
    ):
        yield


def _find_asker(past: frozenset[str]) -> FrameType | None:
    """Return the calling frame outside the modules (or packages) in `past`, if it is user code."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and past & {str(frame.f_globals.get("__name__")), _package(frame)}:
        frame = frame.f_back
    return frame if is_users(frame) else None


_SEEDERS = frozenset(
    ("torch.random", "torch._compile", "torch._dynamo.eval_frame", "contextlib", __name__)
)
"""The modules through which code seeds PyTorch's generator; PyTorch's internal use is not
counted."""
_DRAWERS = frozenset(("random", "secrets", "uuid", "numpy", __name__.partition(".")[0]))
"""Packages skipped when looking for the code that asks the system for random numbers."""


@contextmanager
def watch_entropy() -> Iterator[list[str]]:
    """Context manager: record where user code in this thread draws unseeded random numbers:
    `os.urandom`, `secrets`, `uuid4`, or an unseeded generator of Python or NumPy."""
    found: list[str] = []
    owner, seed, urandom = threading.get_ident(), random.Random.seed, os.urandom

    def note() -> None:
        frame = _find_asker(_DRAWERS)
        if frame is not None and threading.get_ident() == owner:
            found.append(f"the system at {frame.f_code.co_filename}:{frame.f_lineno}")

    def noting_seed(self: Any, a: Any = None, version: int = 2) -> None:
        if a is None:
            note()
        seed(self, a, version)

    def noting_urandom(size: int) -> bytes:
        note()
        return urandom(size)

    # NumPy seeds its generators through Python's `secrets`.
    with (
        mock.patch.object(random.Random, "seed", noting_seed),
        mock.patch.object(random, "_urandom", noting_urandom),
        mock.patch.object(os, "urandom", noting_urandom),
    ):
        yield found


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
