"""Segments: launches on a CPU, native ones in one call, those of PyTorch between them.

In: the C++ runtime, a table of its launches, steps for the others, weights. Out: something that
runs them all over an address table::

    failed = runtime.run(table, sizes, state)   # 0, or which launch failed and why
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turbotx.runtime.state import RunState, Step
from turbotx.runtime.watch import Watch
from turbotx.runtime.weights import PackedWeight, Weights, Window


@dataclass(frozen=True)
class Packing:
    """A packed weight: its slot in the address table, what it is made of, further options."""

    slot: int
    window: Window
    options: Sequence[Any]


class CpuExecutor:
    """Runs launches in order: `segments` are (begin, end) ranges of native launches, or the index
    of one that has a step.

    weight_slots: the place in the address table of every weight that is read as it is.
    """

    def __init__(
        self, weights: Weights, native: ctypes.CDLL | None, records: Any,
        segments: Sequence[tuple[int, int]], steps: Mapping[int, Step],
        weight_slots: Mapping[str, int], packings: Sequence[Packing], slot_count: int,
    ) -> None:  # fmt: skip
        self.weights = weights
        weights.native = native
        weights.packed = frozenset(p.window.tensor for p in packings)
        self.torch_device = torch.device("cpu")
        self.packings, self.slot_count = packings, slot_count
        self._native, self._steps = native, steps
        self._records, self._segments = records, segments
        self._weight_slots = weight_slots
        self._packed: dict[int, PackedWeight] = {}
        self._packed_version = 0
        self._lock = threading.Lock()

    def fill_weights(self, table: Any) -> tuple[int, object]:
        """Write the addresses of everything made from parameters into a table.

        Returns their version, and what must be kept alive as long as the table is used.
        """
        with self._lock:
            version, tensors = self.weights.version, self.weights.tensors
            if self._packed_version != version:
                self._packed = {
                    p.slot: PackedWeight(self._native, self.weights.window(p.window), *p.options)
                    for p in self.packings
                }
                self._packed_version = version
            packed = self._packed
        for name, slot in self._weight_slots.items():
            table[slot] = tensors[name].data_ptr()
        for slot, weight in packed.items():
            table[slot] = weight.address
        return version, (tensors, packed)

    def run(
        self, table: Any, sizes: Any, state: RunState,
        ticks: Any = None, watches: Sequence[Watch] = (),
    ) -> int:  # fmt: skip
        """Run every launch in order; return 0, or (launch + 1) << 32 | the check that failed.

        `ticks` (int64, two a launch) takes the nanoseconds at which each launch began and ended.
        With `watches`, launches run one by one.
        """
        records = ctypes.addressof(self._records)
        addresses, values = ctypes.addressof(table), ctypes.addressof(sizes)
        clock = None if ticks is None else ctypes.addressof(ticks)
        segments = self._segments
        if watches:
            segments = [(i, i + 1) for begin, end in segments for i in range(begin, end)]
        for begin, end in segments:
            for watch in watches:
                watch.before(begin, state)
            step = self._steps.get(begin)
            if step is not None:
                started = time.perf_counter_ns()
                step(state)
                if ticks is not None:
                    ticks[2 * begin : 2 * begin + 2] = started, time.perf_counter_ns()
            else:
                assert self._native is not None
                failed = self._native.ttx_run(records, begin, end, addresses, values, clock)
                if failed:
                    return int(failed)
            for watch in watches:
                watch.after(begin, state)
        return 0

    def repeat(self, launch: int, table: Any, sizes: Any) -> bool:
        """Run one native launch again over an address table; False where PyTorch runs it."""
        if launch in self._steps or self._native is None:
            return False
        pointers = (ctypes.addressof(x) for x in (self._records, table, sizes))
        records, addresses, values = pointers
        self._native.ttx_run(records, launch, launch + 1, addresses, values, None)
        return True
