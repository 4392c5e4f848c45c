"""Step inputs: what a GPU program of a decoder's steps takes at one length, in a graph for many.

In: an executable whose kernels read on the device how much of a cache is filled (`DeviceCells`).
Out: the dims that one graph serves, and what is written and copied before each replay::

    key_of((1, 1, 33, 64, 2))     ->  (1, 1, 128, 64, 2)   # batch, seq, length, capacity, columns
    values_at((1, 1, 33, 64, 2))  ->  (33, 32)             # length, length - seq
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from turbotx.errors import InputError
from turbotx.ir import cache_ops
from turbotx.ir.sizes import Sizes
from turbotx.program.executable import CalledLaunch, Executable, LinkedLaunch

assert cache_ops  # defines the op
APPENDS = (torch.ops.turbotx.cache_append.default, cache_ops.store_rows)
# Rows of a block are these or a multiple: so many keys a tile of attention has at most.
TILE = 64


class StepInputs:
    """cells: None for a program of other calls. cache: the place of the cache's memory among the
    inputs, None where there is none. is_bound: a cache is read at the addresses of one call, which
    no graph can repeat."""

    def __init__(self, executable: Executable) -> None:
        assert executable.gpu is not None
        self.cells = executable.gpu.cells
        names = [t.name for t in executable.inputs]
        stored = {name for x in executable.launches for name in _writes(x, names)}
        assert len(stored) <= 1, stored
        self.cache = names.index(stored.pop()) if stored else None
        self.is_bound = self.cells is None and self.cache is not None
        if self.cells is not None:
            texts = executable.values.texts
            self._values = Sizes(tuple(texts[k] for k in self.cells.values)).compile(
                executable.dims
            )

    def key_of(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Return the dims when the cache is full, which one plan and one graph serve.

        Raises InputError where blocks have rows that no tile ends with.
        """
        assert self.cells is not None
        (rows, columns), key = (dims[k] for k in self.cells.room), list(dims)
        if rows % TILE:
            raise InputError(
                f"a key/value cache has blocks of {rows} rows, and a GPU's kernels take multiples "
                f"of {TILE}"
            )
        for k in self.cells.growing:
            key[k] = max(rows * columns, key[k])
        return tuple(key)

    def values_at(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Return what depends on how much of the cache is filled."""
        return self._values(*dims)

    def pair(
        self, inputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return where in a graph's memory the tensors of a call go, and those that do."""
        copied = [k for k, x in enumerate(given) if k != self.cache and x.numel()]
        return [fit(inputs[k], given[k]) for k in copied], [given[k] for k in copied]


def _writes(launch: LinkedLaunch, inputs: Sequence[str]) -> set[str]:
    """Return the input that a launch writes to: it stores rows in a cache, or appends to one."""
    if isinstance(launch, CalledLaunch) and launch.call.target in APPENDS:
        return {launch.call.args[0].tensor}
    return set(launch.writes).intersection(inputs)


def fit(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the first elements of dense memory, in the shape of a tensor of no more of them."""
    if memory.shape == like.shape:
        return memory
    return memory.view(-1)[: math.prod(like.shape)].view(like.shape)
