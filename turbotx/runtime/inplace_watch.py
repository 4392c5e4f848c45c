"""In-place watch: in poisoned runs, repeats every in-place launch out of place and compares.

In: the launches that reuse memory, and a function that runs one again. Out: a watch of a run that
raises VerifyError if results with shared and separate memory are not bitwise equal::

    VerifyError: fused_add_2: mul is another one beside h's memory than where something is over it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turbotx.errors import VerifyError
from turbotx.runtime.state import RunState


@dataclass(frozen=True)
class TensorSlot:
    """A tensor in the address table. nbytes: its size if it is in the arena, otherwise 0."""

    name: str
    slot: int
    nbytes: int

    def bytes_in(self, state: RunState) -> torch.Tensor:
        """Return its memory in one run, flat uint8."""
        outside = state.tensors.get(self.name)
        if outside is not None:
            return outside.reshape(-1).view(torch.uint8)
        begin = state.offsets[self.name]
        return state.arena[begin : begin + self.nbytes]


@dataclass(frozen=True)
class Reuse:
    """A launch that writes over memory that it reads: those inputs, and everything it writes."""

    launch: str
    lost: Sequence[TensorSlot]
    written: Sequence[TensorSlot]


class InplaceWatch:
    """Compares in-place launches with out-of-place runs.

    reuses: by index of the launch.
    repeat: runs a launch again over `table`; returns whether it did.
    """

    def __init__(
        self, reuses: Mapping[int, Reuse], table: Any, repeat: Callable[[int], bool]
    ) -> None:
        self._reuses, self._table, self._repeat = reuses, table, repeat
        self._inputs: list[torch.Tensor] = []

    def before(self, launch: int, state: RunState) -> None:
        """Copy the inputs that a launch is about to overwrite."""
        reuse = self._reuses.get(launch)
        self._inputs = [p.bytes_in(state).clone() for p in reuse.lost] if reuse else []

    def after(self, launch: int, state: RunState) -> None:
        """Run the launch again out of place, from the copies; raise VerifyError if results
        differ."""
        reuse = self._reuses.get(launch)
        if reuse is None:
            return
        came = [p.bytes_in(state) for p in reuse.written]
        apart = [torch.empty_like(x) for x in came]
        places, memory = [*reuse.lost, *reuse.written], [*self._inputs, *apart]
        kept = [self._table[p.slot] for p in places]
        for place, other in zip(places, memory, strict=True):
            self._table[place.slot] = other.data_ptr()
        try:
            ran = self._repeat(launch)
        finally:
            for place, address in zip(places, kept, strict=True):
                self._table[place.slot] = address
        for place, own, other in zip(reuse.written, came, apart, strict=True):
            if ran and not torch.equal(own, other):
                lost = ", ".join(p.name for p in reuse.lost)
                raise VerifyError(
                    f"{reuse.launch}: {place.name} is another one beside {lost}'s memory than "
                    "where something is over it: that memory must not be reused"
                )
