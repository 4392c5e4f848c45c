"""Step inputs: lets one CUDA graph serve decoding steps of many cache lengths.

In: an executable whose kernels read the cache's length from device memory (`DeviceCells`). Out: the
dims that a graph is cached by, and the values to write and tensors to copy before each replay::

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
# A cache block's rows must be a multiple of this: the most keys of an attention tile.
TILE = 64


class StepInputs:
    """cells: None for programs without a cache. cache: index of the cache's memory in the inputs,
    or None. is_bound: the cache is read at this call's addresses, so that no graph can be used."""

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
        """Return the dims with a full cache, the key of plans and graphs.

        Raises InputError if the cache's block size is no multiple of TILE.
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
        """Return the values of the device cells at these dims."""
        return self._values(*dims)

    def pair(
        self, inputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the destinations in a graph's memory and the call's tensors to copy there."""
        copied = [k for k, x in enumerate(given) if k != self.cache and x.numel()]
        return [fit(inputs[k], given[k]) for k in copied], [given[k] for k in copied]


def _writes(launch: LinkedLaunch, inputs: Sequence[str]) -> set[str]:
    """Return the inputs that a launch writes to: caches it stores or appends rows to."""
    if isinstance(launch, CalledLaunch) and launch.call.target in APPENDS:
        return {launch.call.args[0].tensor}
    return set(launch.writes).intersection(inputs)


def fit(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a view of the first elements of dense `memory` in the shape of `like`."""
    if memory.shape == like.shape:
        return memory
    return memory.view(-1)[: math.prod(like.shape)].view(like.shape)
