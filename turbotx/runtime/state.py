"""State: the memory and tensors of one run of a program.

In: a shape, the arena, tensors by name. Out: tensors over planned memory, inputs, outputs and
weights alike::

    state.whole("query", torch.float32)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


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
        if name not in self.offsets:
            return self.tensors[name]  # a prepared constant that is made when it is asked for
        begin = self.offsets[name]
        count = (self.arena.numel() - begin) // dtype.itemsize
        return self.arena[begin : begin + count * dtype.itemsize].view(dtype)


Step = Callable[[RunState], None]
Maker = Callable[[RunState], Any]
