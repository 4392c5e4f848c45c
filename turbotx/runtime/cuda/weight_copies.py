"""Weight copies: repeats a launch on copies of its weights that are not in L2, for timing.

In: a launch of a program that has run, and its address table. Out: the state to queue it with; each
turn writes the addresses of another copy to the table::

    with WeightCopies(runtime, 3, table, state, sizes) as copies:
        runtime.queue(3, parts, table, copies.turn())

In a real call, every launch reads its own weights from device memory. Repeating a launch over the
same weights would read them from the L2 cache (50 MB or more).
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from turbotx import ir
from turbotx.runtime.cuda.runtime import CudaRuntime
from turbotx.runtime.state import RunState

# The copies together exceed any device's L2 cache. Small weights have as many copies as fit into a
# graph: their time is not dominated by memory.
LEAST_NBYTES = 128 << 20
MOST_COPIES = 256


class WeightCopies:
    """count: the number of copies. table: the program's address table."""

    def __init__(
        self, runtime: CudaRuntime, launch: int, table: Any, state: RunState, sizes: Any
    ) -> None:
        self.table, self._state, self._sizes = table, state, sizes
        self._slots = runtime.kernels.table.slots
        one = runtime.kernels.assembly.launches[launch]
        fallback = one.fallback if isinstance(one, ir.GemmLaunch) else None
        others = () if fallback is None else (fallback.gemm, *fallback.ends)
        read = dict.fromkeys(name for x in (one, *others) for name in x.reads)
        held = runtime.placed.held.tensors
        weights = {name: held[name] for name in read if name in held}
        nbytes = sum(t.nbytes for t in weights.values())
        self.count = min(MOST_COPIES, math.ceil(LEAST_NBYTES / nbytes)) if nbytes else 1
        turns = range(1, self.count)
        self._copies = [weights, *({n: _copy(t) for n, t in weights.items()} for _ in turns)]
        self._next = 0

    def __enter__(self) -> WeightCopies:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def turn(self) -> RunState:
        """Point the table at the next copy; return the state for PyTorch's calls."""
        copy = self._copies[self._next]
        self._next = (self._next + 1) % self.count
        return self._point(copy)

    def restore(self) -> None:
        """Point the table at the program's own weights."""
        self._next = 0
        self._point(self._copies[0])

    def _point(self, copy: Mapping[str, torch.Tensor]) -> RunState:
        for name, tensor in copy.items():
            self.table[self._slots[name]] = tensor.data_ptr()
        self.table.arguments.refill(self._sizes)
        if copy is self._copies[0]:
            return self._state
        return replace(self._state, tensors=ChainMap(dict(copy), dict(self._state.tensors)))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return made.copy_(tensor)
