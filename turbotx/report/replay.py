"""Replay: run a compiled call one launch at a time and look at memory between them.

In: a compiled call, its tensors, and an observer. Out: the call's outputs; the observer sees every
operand just before the launch that reads it, and every result just after::

    replay(compiled, tensors, observer)     # observer.before(i, read), observer.after(i, read)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from turbotx import ir
from turbotx.engine.compiled import Compiled
from turbotx.program.link import plain_window
from turbotx.runtime.aten import make_window
from turbotx.runtime.state import RunState

Read = Callable[[ir.Operand], torch.Tensor]


class Observer(Protocol):
    """`read` returns a copy of what an operand shows at that moment."""

    def before(self, index: int, read: Read) -> None:
        """See the tensors as they are before the launch of that index."""

    def after(self, index: int, read: Read) -> None:
        """See the tensors as the launch of that index has left them."""


def replay(compiled: Compiled, tensors: Sequence[torch.Tensor], observer: Observer) -> list[Any]:
    """Run `compiled`, which nothing else may use meanwhile; return the output's leaves."""
    dims = compiled.captured.matcher.match([t.shape for t in tensors])
    assert dims is not None
    program = compiled.program
    watch = _Replay(observer, compiled.captured.dims)
    with torch.no_grad():
        return program.run(program.bind(dims), tensors, watch=watch)


class _Replay:
    """The watch that hands an observer its way to read."""

    def __init__(self, observer: Observer, dims: Sequence[str]) -> None:
        self._observer, self._dims = observer, dims

    def before(self, launch: int, state: RunState) -> None:
        self._observer.before(launch, make_reader(state, self._dims))

    def after(self, launch: int, state: RunState) -> None:
        self._observer.after(launch, make_reader(state, self._dims))


def make_reader(state: RunState, dims: Sequence[str]) -> Read:
    """Return a function that gives a copy of what an operand shows in a run."""
    view = make_viewer(state, dims)
    return lambda operand: view(operand).clone()


def make_viewer(state: RunState, dims: Sequence[str]) -> Read:
    """Return a function that gives an operand's own memory in a run, as a tensor."""
    return lambda operand: make_window(plain_window(operand), dims)(state)
