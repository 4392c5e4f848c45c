"""Binding: a call at one shape: its sizes, plan and address table.

In: nothing, these are types that CPUs and GPUs share. Out: for example::

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
    """Offsets by name, laid out when one is asked for: only ops of PyTorch and watches do."""

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
    """A call at one shape: every size evaluated, every offset planned.

    offsets: in the order of the liveness' `root_of`, and offset_of by name. outputs: slot, shape,
    dtype.
    """

    dims: tuple[int, ...]
    sizes: Any
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    offset_of: Mapping[str, int]
    footprint_nbytes: int
    outputs: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]


class Execution:
    """The address table of one arena; one call at a time uses it."""

    def __init__(self, count: int) -> None:
        self.table = (ctypes.c_int64 * count)()
        self.numbers = np.ctypeslib.as_array(self.table)
        self.offsets: Any = None  # of the binding that the table is set for
        self.base = 0
        self.weights_version = -1
        self.kept: Any = None


class Runtime(Protocol):
    """What runs a call's launches."""

    weights: Weights
    torch_device: torch.device
    builds: int
    """How many libraries or kernels had to be compiled."""

    def fill_weights(self, table: Any) -> tuple[int, object]:
        """Write the addresses of everything made from parameters into a table.

        Returns their version, and what must be kept alive as long as the table is used.
        """

    def run(
        self, table: Any, sizes: Any, state: RunState,
        ticks: Any = None, watches: Sequence[Watch] = (),
    ) -> int:  # fmt: skip
        """Run every launch in order; return 0, or (launch + 1) << 32 | the check that failed."""
