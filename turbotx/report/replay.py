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
from turbotx.pipeline import Compiled
from turbotx.runtime.aten import RunState
from turbotx.signature import SizeMatcher
from turbotx.sizes import compile_evaluator

Read = Callable[[ir.Operand], torch.Tensor]


class Observer(Protocol):
    """`read` returns a copy of what an operand shows at that moment."""

    def before(self, index: int, read: Read) -> None: ...

    def after(self, index: int, read: Read) -> None: ...


def replay(compiled: Compiled, tensors: Sequence[torch.Tensor], observer: Observer) -> list[Any]:
    """Run `compiled`, which nothing else may use meanwhile; return the output's leaves."""
    program = compiled.program
    dims = SizeMatcher(compiled.captured).match([t.shape for t in tensors])
    assert dims is not None
    runtime = program.runtime
    program.runtime = _Stepper(runtime, compiled, observer)  # type: ignore[assignment]
    try:
        with torch.no_grad():
            return program.run(program.bind(dims), tensors)
    finally:
        program.runtime = runtime


class _Stepper:
    """The program's own runtime, asked for one launch at a time."""

    def __init__(self, runtime: Any, compiled: Compiled, observer: Observer) -> None:
        self._runtime, self._observer = runtime, observer
        self._compiled = compiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def run(self, table: Any, sizes: Any, state: Callable[[], RunState], ticks: Any = None) -> int:
        given = state()
        read = _reader(given, self._compiled.captured.dims)
        whole = self._runtime.table.segments
        try:
            for index in range(len(self._compiled.assembly.launches)):
                self._observer.before(index, read)
                self._runtime.table.segments = [(index, index + 1)]
                failed = self._runtime.run(table, sizes, state, ticks)
                if failed:
                    return int(failed)
                self._observer.after(index, read)
        finally:
            self._runtime.table.segments = whole
        return 0


def _reader(state: RunState, dims: Sequence[str]) -> Read:
    def read(operand: ir.Operand) -> torch.Tensor:
        evaluate = compile_evaluator([*operand.shape, *operand.strides, operand.offset], dims)
        numbers = evaluate(*state.dims)
        rank = len(operand.shape)
        shape, strides, offset = numbers[:rank], numbers[rank : 2 * rank], numbers[-1]
        base = state.tensors.get(operand.tensor)
        if base is None:
            begin, size = state.offsets[operand.tensor], operand.dtype.itemsize
            count = (state.arena.numel() - begin) // size
            base = state.arena[begin : begin + count * size].view(operand.dtype)
        return base.as_strided(shape, strides, base.storage_offset() + offset).clone()

    return read
