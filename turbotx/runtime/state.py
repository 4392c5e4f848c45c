"""State: what one run of a program works on, and how a tensor of it is looked at.

In: a shape, the arena, tensors by name. Out: windows on them, by sizes evaluated at the shape; no
symbolic sizes here, so that saved programs load without them::

    look = make_window("query", torch.float32, shape, strides, offset)
    look(state)  ->  a tensor over planned memory, or over an input, an output or a weight
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# All values of several sizes at once, of a program's dims in order.
Evaluate = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class RunState:
    """What one run of a program works on.

    dims: the shape. offsets: bytes from the arena's start, per planned tensor. arena: its memory,
    flat uint8. tensors: inputs, outputs, parameters and prepared constants by name. given: inputs
    as the caller gave them, by name.
    """

    dims: tuple[int, ...]
    offsets: Mapping[str, int]
    arena: torch.Tensor
    tensors: Mapping[str, torch.Tensor]
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor; for a planned one, all of the arena from where it begins."""
        found = self.tensors.get(name)
        if found is not None:
            return found
        begin = self.offsets[name]
        count = (self.arena.numel() - begin) // dtype.itemsize
        return self.arena[begin : begin + count * dtype.itemsize].view(dtype)


Step = Callable[[RunState], None]
Maker = Callable[[RunState], Any]


def make_window(
    name: str, dtype: torch.dtype, shape: Evaluate, strides: Evaluate, offset: Evaluate
) -> Callable[[RunState], torch.Tensor]:
    """Return a function that gives a window on a tensor in one run; offset: of one value."""

    def look(state: RunState) -> torch.Tensor:
        base, dims = state.whole(name, dtype), state.dims
        start = base.storage_offset() + offset(*dims)[0]
        return base.as_strided(shape(*dims), strides(*dims), start)

    return look


def make_alias(
    root: str, steps: Sequence[tuple[Any, Maker, Maker]]
) -> Callable[[RunState], torch.Tensor]:
    """Return a function that gives an input or a parameter itself in one run, or a view of it.

    steps: calls of it, one after the other: the op, its arguments after the first, its keywords.
    """

    def look(state: RunState) -> torch.Tensor:
        given = state.given.get(root)
        value: Any = state.tensors[root] if given is None else given
        for op, args, kwargs in steps:
            value = op(value, *args(state), **kwargs(state))
        return value

    return look
