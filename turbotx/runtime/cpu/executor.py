"""Executor: runs launches on a CPU, consecutive native ones in one call, PyTorch's between them.

In: an executable, the libraries that it names, weights. Out: an object that runs it over an address
table; used for compiled and for loaded programs::

    failed = runtime.run(table, sizes, state)   # 0, or which launch failed and why
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from turbotx.program.executable import CalledLaunch, Executable, NativeLaunch, Packing
from turbotx.runtime.aten import make_step
from turbotx.runtime.cpu.abi import LaunchRecord, products_of
from turbotx.runtime.packed_sources import find_sources, packed_before
from turbotx.runtime.packed_weight import PackedExperts, PackedWeight
from turbotx.runtime.state import RunState
from turbotx.runtime.watch import Watch
from turbotx.runtime.weights import Weights

FEW = 16
"""Launches between ops of PyTorch up to which its threads do them too. For more of them its threads
are ended, which else take up the processors of turbotx's own for milliseconds."""


class CpuExecutor:
    """Runs launches in order.

    libraries: those that its launches name, and "runtime"; none where PyTorch runs all launches.
    builds: number of shared objects that had to be compiled.
    """

    def __init__(
        self, executable: Executable, weights: Weights, libraries: Mapping[str, ctypes.CDLL],
        keep_weights: bool = True,
    ) -> None:  # fmt: skip
        assert executable.cpu is not None, "compiled for another device"
        self.weights, self.builds = weights, 0
        self.packings = executable.cpu.packings
        self.torch_device = torch.device("cpu")
        self._native = weights.native = libraries.get("runtime")
        self.libraries = libraries
        if self._native is not None:
            for library in libraries.values():
                library.ttx_use_threads(self._native.ttx_share)
        weights.packed = frozenset(w.tensor for p in self.packings for w in p.parts)
        weights.quantized = tuple(p for p in self.packings if p.sources)
        weights.read = frozenset(executable.weights)
        self._keep_weights = keep_weights
        segments = executable.cpu.segments
        self._segments = [(b, e, len(segments) > 1 and e - b <= FEW) for b, e in segments]
        self._records = (LaunchRecord * max(1, len(executable.launches)))()
        self._arrays: list[Any] = []  # keeps alive what the records point to
        self._steps = {}
        for i, launch in enumerate(executable.launches):
            if isinstance(launch, CalledLaunch):
                self._steps[i] = make_step(launch.call, executable.dims)
            else:
                assert isinstance(launch, NativeLaunch)
                self._fill(self._records[i], launch, libraries[launch.library])
        self._weight_slots = {name: executable.slots[name] for name in executable.weights}
        self._packed: dict[int, PackedWeight | PackedExperts] = {}
        self._packed_version = 0
        self._lock = threading.Lock()

    def _fill(self, record: LaunchRecord, launch: NativeLaunch, library: ctypes.CDLL) -> None:
        record.call = ctypes.cast(getattr(library, launch.symbol), ctypes.c_void_p).value
        record.arg_count, record.size_count = len(launch.slots), len(launch.sizes)
        rows = (launch.slots, launch.offsets, launch.sizes)
        arrays = [(ctypes.c_int32 * max(1, len(numbers)))(*numbers) for numbers in rows]
        record.slots, record.offsets, record.sizes = arrays
        self._arrays += arrays

    def fill_weights(self, table: Any) -> tuple[int, object]:
        """Write the addresses of parameters and everything derived from them into a table.

        Returns the weights' version, and an object to keep alive while the table is in use.
        """
        with self._lock:
            version, tensors = self.weights.version, self.weights.tensors
            if self._packed_version != version and self._native is not None:
                self._packed = {p.slot: self._pack(p) for p in self.packings}
                self._packed_version = version
                if not self._keep_weights:
                    self.weights.release(find_sources(self.packings, self._packed, tensors))
                self.weights.drop_packed()
            packed = self._packed
        for name, slot in self._weight_slots.items():
            table[slot] = tensors[name].data_ptr()
        for slot, weight in packed.items():
            table[slot] = weight.address
        return version, (tensors, packed)

    def _pack(self, packing: Packing) -> PackedWeight | PackedExperts:
        """Return a packed weight; reuse the one that its parameters were released to, if there is
        one."""
        if len(packing.parts[0].shape) == 3:
            experts = self.weights.window(packing.parts[0])
            return PackedExperts(self.libraries["experts"], experts, packing.gated)
        found = packed_before(packing, self.weights.tensors)
        if found is None:
            parts = [*map(self.weights.window, packing.parts)]
            library = self.libraries[products_of(parts[0].dtype)]
            found = PackedWeight.of(library, parts, packing.gated)
            if packing.scale:
                scale = self.weights.tensors[packing.scale]
                found.scale_by(scale, packing.group, packing.depth)
        return found

    def run(
        self, table: Any, sizes: Any, state: RunState,
        ticks: Any = None, watches: Sequence[Watch] = (),
    ) -> int:  # fmt: skip
        """Run all launches in order; return 0, or (launch + 1) << 32 | number of the failed check.

        ticks: int64, two per launch, receives the nanoseconds at which each launch began and ended.
        watches: called around every launch; launches then run one by one.
        """
        records = ctypes.addressof(self._records)
        addresses, values = ctypes.addressof(table), ctypes.addressof(sizes)
        clock = None if ticks is None else ctypes.addressof(ticks)
        segments = self._segments
        if watches:
            segments = [(i, i + 1, t) for begin, end, t in segments for i in range(begin, end)]
        for begin, end, with_team in segments:
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
                failed = self._native.ttx_run(
                    records, begin, end, addresses, values, clock, with_team
                )
                if failed:
                    return int(failed)
            for watch in watches:
                watch.after(begin, state)
        return 0

    def repeat(self, launch: int, table: Any, sizes: Any) -> bool:
        """Run one native launch again over an address table; return False if PyTorch runs it."""
        if launch in self._steps or self._native is None:
            return False
        pointers = (ctypes.addressof(x) for x in (self._records, table, sizes))
        records, addresses, values = pointers
        self._native.ttx_run(records, launch, launch + 1, addresses, values, None, 0)
        return True
