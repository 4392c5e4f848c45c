"""Argument arrays: the pointer arrays that cuLaunchKernel reads, one set per address table.

In: the position of every launch's arguments in the tables of addresses and sizes. Out: per launch
an array of pointers into the two tables, which stays valid for every shape::

    arguments.refill(sizes)
    device.launch(function, grid, arguments.addresses[3, "kernel"], stream)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from turbotx.program.executable import ArgumentLayout, DeviceCells
from turbotx.runtime.cuda.status import Status
from turbotx.runtime.lru import LruDict

# Shapes whose views of GEMM operands are cached, per arena.
KEPT_SHAPES = 16
# Arguments that Triton's calling convention appends to a kernel's own, rounded up.
EXTRA_ARGUMENTS = 4
# A launch's index and the name of one of its argument lists.
Key = tuple[int, str]


class KernelArguments:
    """Argument arrays over one address table.

    Tensors are read from the table, tensors at an offset from `shifted`, sizes from `sizes`. turns:
    zeroed int32 counters on the device, zero again after every split-K launch. cells: values that
    kernels read from device memory.
    """

    def __init__(
        self, table: Any, layouts: Mapping[Key, ArgumentLayout], count: int, status: Status,
        turns: torch.Tensor, cells: DeviceCells | None = None,
    ) -> None:  # fmt: skip
        self._table = np.ctypeslib.as_array(table)
        self._sizes = np.zeros(max(1, count), dtype=np.int64)
        windows = dict.fromkeys(
            p for layout in layouts.values() for p in layout.pointers if p[1] is not None
        )
        self._bases = np.array([slot for slot, _ in windows], dtype=np.int64)
        self._shifts = np.array([shift for _, shift in windows], dtype=np.int64)
        self._shifted = np.zeros(max(1, len(windows)), dtype=np.int64)
        self._places = {p: 8 * k for k, p in enumerate(windows)}
        launches = max((i for i, _ in layouts), default=-1) + 1
        self._status, self.turns = status, turns  # keeps the memory of the addresses below alive
        self._statuses = np.array([status.address(i) for i in range(launches)], dtype=np.int64)
        self._turn = np.array([turns.data_ptr()], dtype=np.int64)
        self._nothing = np.zeros(1, dtype=np.int64)
        keys = () if cells is None else (*cells.values, (cells.slot, None))
        self._cells = torch.zeros(len(keys), dtype=torch.int64, device=turns.device)
        self._cell_addresses = self._cells.data_ptr() + 8 * np.arange(len(keys), dtype=np.int64)
        first = self._cell_addresses.ctypes.data
        self._cell_of: dict[object, int] = {key: first + 8 * k for k, key in enumerate(keys)}
        self.addresses = {key: self._array(key[0], layout) for key, layout in layouts.items()}
        self._stamp: object = None
        self._views: LruDict[int, tuple[object, dict[int, Callable[[], object]]]]
        self._views = LruDict(KEPT_SHAPES)

    def _array(self, i: int, layout: ArgumentLayout) -> Any:
        table, shifted = self._table.ctypes.data, self._shifted.ctypes.data
        found = [
            self._cell_of.get(p)
            or (table + 8 * p[0] if p[1] is None else shifted + self._places[p])
            for p in layout.pointers
        ]
        cells = {"status": self._statuses.ctypes.data + 8 * i, "turns": self._turn.ctypes.data}
        found += [cells[layout.cell]] if layout.cell else []
        # Little-endian: a 32-bit argument is the low half of the 64-bit size.
        sizes = self._sizes.ctypes.data
        found += [self._cell_of.get(k) or sizes + 8 * k for k in layout.sizes]
        found += [self._nothing.ctypes.data] * EXTRA_ARGUMENTS
        return (ctypes.c_void_p * len(found))(*found)

    def refill(self, sizes: Any) -> None:
        """Copy a shape's sizes, and recompute `shifted` from the table's addresses."""
        self._sizes[: len(sizes)] = sizes
        if len(self._bases):
            self._shifted[:] = self._table[self._bases] + self._sizes[self._shifts]

    def write_cells(self, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """Queue a copy of `numbers`, int64, to the device cells; the array may be reused on
        return."""
        self._cells.copy_(torch.from_numpy(numbers), non_blocking=True)

    def views(self, bound: object, stamp: object) -> dict[int, Callable[[], object]]:
        """Return the cached PyTorch calls of a shape by launch; emptied when `stamp` changes."""
        if self._stamp != stamp:
            self._views.clear()
            self._stamp = stamp
        kept = self._views.find(id(bound))
        if kept is None:
            kept = self._views[id(bound)] = bound, {}
        return kept[1]
