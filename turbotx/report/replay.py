"""Replay: runs a compiled call one launch at a time and observes memory in between.

In: a compiled call, its tensors, and an observer. Out: the call's outputs; the observer sees all
operands just before each launch, and all results just after::

    replay(compiled, tensors, observer)     # observer.before(i, read), observer.after(i, read)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from turbotx import ir
from turbotx.engine.compiled import Compiled
from turbotx.errors import InputError
from turbotx.program.link import plain_window
from turbotx.runtime.aten import make_window
from turbotx.runtime.state import RunState

Read = Callable[[ir.Operand], torch.Tensor]


class Observer(Protocol):
    """`read` returns a copy of an operand's current contents."""

    def before(self, index: int, read: Read) -> None:
        """Observe the tensors before the launch of that index."""

    def after(self, index: int, read: Read) -> None:
        """Observe the tensors after the launch of that index."""


def dims_of(compiled: Compiled, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return the values of a compiled call's dims for these inputs, in the dims' order.

    Raises InputError for inputs of another call: other tensors, ranks, or sizes that violate a
    guard.
    """
    matcher, shapes = compiled.captured.matcher, [tuple(t.shape) for t in tensors]
    ranks = [len(sizes) for _, sizes in matcher.rules.inputs]
    if ranks != list(map(len, shapes)):
        raise InputError(f"inputs of the shapes {shapes} are of another call: ranks are {ranks}")
    dims = matcher.match(shapes)
    if dims is None:
        raise InputError(f"these inputs are of another call: {matcher.explain(shapes)}")
    return dims


def replay(compiled: Compiled, tensors: Sequence[torch.Tensor], observer: Observer) -> list[Any]:
    """Run `compiled` and return the output's leaves; not thread-safe. Raises InputError for inputs
    of another call."""
    program, dims = compiled.program, dims_of(compiled, tensors)
    watch = _Replay(observer, compiled.captured.dims)
    with torch.no_grad():
        return program.run(program.bind(dims), tensors, watch=watch)


class _Replay:
    """A watch that calls an observer."""

    def __init__(self, observer: Observer, dims: Sequence[str]) -> None:
        self._observer, self._dims = observer, dims

    def before(self, launch: int, state: RunState) -> None:
        self._observer.before(launch, make_reader(state, self._dims))

    def after(self, launch: int, state: RunState) -> None:
        self._observer.after(launch, make_reader(state, self._dims))


def make_reader(state: RunState, dims: Sequence[str]) -> Read:
    """Return a function that copies an operand's contents in a run."""
    view = make_viewer(state, dims)
    return lambda operand: view(operand).clone()


def make_viewer(state: RunState, dims: Sequence[str]) -> Read:
    """Return a function that returns an operand's own memory in a run, as a tensor."""
    return lambda operand: make_window(plain_window(operand), dims)(state)
