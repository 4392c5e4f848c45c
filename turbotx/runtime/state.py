"""State: the memory and tensors of one run of a program.

In: a shape, the arena, tensors by name. Out: any tensor by name, whether planned, input, output or
weight::

    state.whole("query", torch.float32)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class RunState:
    """The memory and tensors of one run.

    dims: the shape.
    offsets: of each planned tensor, in bytes from the arena's start.
    arena: flat uint8.
    tensors: inputs, outputs, parameters and hoisted constants by name.
    given: the caller's original inputs by name.
    """

    dims: tuple[int, ...]
    offsets: Mapping[str, int]
    arena: torch.Tensor
    tensors: Mapping[str, torch.Tensor]
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor; for a planned one, the arena from its offset on."""
        found = self.tensors.get(name)
        if found is not None:
            return found
        if name not in self.offsets:
            return self.tensors[name]  # a hoisted constant that is computed on access
        begin = self.offsets[name]
        count = (self.arena.numel() - begin) // dtype.itemsize
        return self.arena[begin : begin + count * dtype.itemsize].view(dtype)


Step = Callable[[RunState], None]
Maker = Callable[[RunState], Any]
