"""Step inputs: what a GPU program of a decoder's steps takes at one length, in a graph for many.

In: an executable whose kernels read on the device how much of a cache is filled (`DeviceCells`).
Out: the dims that one graph serves, and what is written and copied before each replay::

    key_of((1, 1, 33, 64))     ->  (1, 1, 64, 64)     # batch, seq, length, capacity
    values_at((1, 1, 33, 64))  ->  (33, 32)           # length, length - seq
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from turbotx.ir import cache_ops
from turbotx.ir.sizes import Sizes
from turbotx.program.executable import CalledLaunch, Executable, LinkedLaunch

assert cache_ops  # defines the op
_NONE = np.zeros(0, dtype=np.int64)


class StepInputs:
    """cells: None for a program of other calls. cache: the place of the cache's memory among the
    inputs. is_bound: a cache is read at the addresses of one call, which no graph can repeat."""

    def __init__(self, executable: Executable) -> None:
        assert executable.gpu is not None
        self.cells, self.cache = executable.gpu.cells, -1
        names = [t.name for t in executable.inputs]
        # Kernels on a GPU take contiguous caches alone, and read no table.
        self._unread = {k for k, name in enumerate(names) if name == "kv_table"}
        stores = any(_writes(launch, names) for launch in executable.launches)
        self.is_bound = self.cells is None and stores
        if self.cells is not None:
            self.cache = names.index(self.cells.cache)
            texts = executable.values.texts
            self._values = Sizes(tuple(texts[k] for k in self.cells.values)).compile(
                executable.dims
            )

    def key_of(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Return the dims when the cache is full, which one plan and one graph serve."""
        assert self.cells is not None
        capacity, key = dims[self.cells.capacity], list(dims)
        for k in self.cells.growing:
            key[k] = max(capacity, key[k])
        return tuple(key)

    def values_at(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Return what depends on how much of the cache is filled."""
        return self._values(*dims)

    def find_windows(self, sizes: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return where layers' keys and values begin in the cache, in bytes."""
        if self.cells is None:
            return _NONE
        shifts = [0 if k is None else sizes[k] for _, k in self.cells.windows]
        return np.array(shifts, dtype=np.int64)

    def pair(
        self, inputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return where in a graph's memory the tensors of a call go, and those that do."""
        left = self._unread | {self.cache}
        copied = [k for k, x in enumerate(given) if k not in left and x.numel()]
        return [fit(inputs[k], given[k]) for k in copied], [given[k] for k in copied]


def _writes(launch: LinkedLaunch, inputs: Sequence[str]) -> bool:
    """Tell whether a launch writes to an input: it stores rows in a cache, or appends to one."""
    append = torch.ops.turbotx.cache_append.default
    appends = isinstance(launch, CalledLaunch) and launch.call.target is append
    return appends or not set(launch.writes).isdisjoint(inputs)


def fit(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the first elements of dense memory, in the shape of a tensor of no more of them."""
    if memory.shape == like.shape:
        return memory
    return memory.view(-1)[: math.prod(like.shape)].view(like.shape)
