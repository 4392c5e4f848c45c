"""Binding: a call at one shape: its sizes, plan and address table.

In: nothing, these are types shared by CPUs and GPUs. Out, for example::

    Binding(dims=(2, 17), sizes=..., offsets=array([0, 52224, ...]), footprint_nbytes=104448, ...)
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from turbotx.runtime.state import RunState
from turbotx.runtime.watch import Watch
from turbotx.runtime.weights import Weights


class NamedOffsets(Mapping[str, int]):
    """Offsets by name, computed on first access: only PyTorch's ops and watches need them."""

    def __init__(self, names: Iterable[str], offsets: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self._names, self._offsets = names, offsets

    @cached_property
    def _found(self) -> dict[str, int]:
        return dict(zip(self._names, self._offsets.tolist(), strict=True))

    def __getitem__(self, name: str) -> int:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


@dataclass(frozen=True)
class Binding:
    """A call at one shape, with all sizes evaluated and all offsets planned.

    offsets: in the order of the liveness' `root_of`; offset_of: the same by name.
    outputs: (slot, shape, dtype).
    """

    dims: tuple[int, ...]
    sizes: Any
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    offset_of: Mapping[str, int]
    footprint_nbytes: int
    outputs: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]


class Execution:
    """The address table of one arena; used by one call at a time."""

    def __init__(self, count: int) -> None:
        self.table = (ctypes.c_int64 * count)()
        self.numbers = np.ctypeslib.as_array(self.table)
        self.offsets: Any = None  # of the binding for which the table is set
        self.base = 0
        self.weights_version = -1
        self.kept: Any = None


class Runtime(Protocol):
    """Runs a call's launches on one kind of device."""

    weights: Weights
    torch_device: torch.device
    builds: int
    """Number of libraries or kernels that had to be compiled."""

    def fill_weights(self, table: Any) -> tuple[int, object]:
        """Write the addresses of parameters and everything derived from them into a table.

        Returns the weights' version, and an object to keep alive while the table is in use.
        """

    def run(
        self, table: Any, sizes: Any, state: RunState,
        ticks: Any = None, watches: Sequence[Watch] = (),
    ) -> int:  # fmt: skip
        """Run all launches in order; return 0, or (launch + 1) << 32 | number of the failed
        check."""
