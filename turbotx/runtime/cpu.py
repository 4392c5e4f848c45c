"""The CPU runtime: native launches in one call, the rest through PyTorch between them.

In: an assembly and the program's weights. Out: something that runs it over an address table::

    failed = runtime.run(table, sizes, state)   # 0, or which launch failed and why
"""

from __future__ import annotations

import ctypes
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from turbotx import ir
from turbotx.assemble import Assembly
from turbotx.errors import BuildWarning, NoCompilerError
from turbotx.kernels.build import build_library
from turbotx.kernels.epilogue import GemmKernel
from turbotx.options import Options
from turbotx.runtime.aten import AtenSteps, RunState
from turbotx.runtime.native import LaunchTable, load_runtime, packed_name, print_units
from turbotx.runtime.watch import Watch
from turbotx.runtime.weights import PackedWeight, Weights

NATIVE_KINDS = frozenset({"kernel", "gemm", "attention", "product"})


class CpuRuntime:
    """Builds a program's kernels and executes its launches.

    builds: how many shared objects had to be compiled. sources: the C++ by translation unit.
    """

    def __init__(
        self, assembly: Assembly, weights: Weights, options: Options, dims: Sequence[str]
    ) -> None:
        self.assembly, self.weights = assembly, weights
        self.torch_device = torch.device("cpu")
        self.builds = 0
        self.sources: dict[str, str] = {}
        self.names: dict[object, str] = {}
        self._native: ctypes.CDLL | None = None
        kernels = None
        if options.backend != "aten":
            try:
                kernels = self._build()
            except NoCompilerError as error:
                if options.backend == "cpp":
                    raise
                warnings.warn(
                    f"{error}; until then regions run through ATen, in planned memory, slower",
                    BuildWarning,
                    stacklevel=2,
                )
        weights.native = self._native
        kinds: frozenset[str] = NATIVE_KINDS if self._native is not None else frozenset()
        if not options.pack_weights:
            kinds -= {"gemm"}
        self.table = LaunchTable(assembly, kinds, self._native, kernels, self.names)
        steps = AtenSteps(assembly.tensors, dims)
        self._steps = {
            i: steps.make(x) for i, x in enumerate(assembly.launches) if x.kind not in kinds
        }
        self._packed: dict[str, PackedWeight] = {}
        self._packed_version = 0
        self._gemm_weights = {
            packed_name(x): (x.args[1], x.target.gated)
            for x in assembly.launches
            if isinstance(x.target, GemmKernel) and x.kind in kinds and x.args[1] is not None
        }
        self._lock = threading.Lock()
        self._records = ctypes.addressof(self.table.records)

    def _build(self) -> ctypes.CDLL | None:
        self._native, built = load_runtime()
        self.builds += built
        self.sources, self.names = print_units(self.assembly)
        if not self.sources:
            return None
        library, built = build_library(self.sources)
        self.builds += built
        return library

    @property
    def is_native(self) -> bool:
        """Whether generated kernels run, not PyTorch's ops in their place."""
        return self._native is not None

    def packings(self) -> Iterator[tuple[str, ir.Operand, tuple[Any, ...]]]:
        """Give every packed weight: its name in the table, what it is made of, further options."""
        for name, (operand, gated) in self._gemm_weights.items():
            yield name, operand, (gated,)

    def fill_weights(self, table: Any) -> tuple[int, object]:
        """Write the addresses of everything made from parameters into a table.

        Returns their version, and what must be kept alive as long as the table is used.
        """
        with self._lock:
            version, tensors = self.weights.version, self.weights.tensors
            if self._packed_version != version:
                self._packed = {
                    name: PackedWeight(self._native, self.weights.window(operand), *options)
                    for name, operand, options in self.packings()
                }
                self._packed_version = version
            packed = self._packed
        slots = self.table.slots
        for name, tensor in tensors.items():
            if name in slots:
                table[slots[name]] = tensor.data_ptr()
        for name, weight in packed.items():
            table[slots[name]] = weight.address
        return version, (tensors, packed)

    def run(
        self, table: Any, sizes: Any, state: Callable[[], RunState],
        ticks: Any = None, watches: Sequence[Watch] = (),
    ) -> int:  # fmt: skip
        """Run every launch in order; return 0, or launch << 32 | code of the first that failed.

        `state` is asked for only if PyTorch has a launch to run. `ticks` (int64, two a launch)
        takes the nanoseconds at which each launch began and ended. With `watches`, launches run
        one by one.
        """
        addresses, values = ctypes.addressof(table), ctypes.addressof(sizes)
        clock = None if ticks is None else ctypes.addressof(ticks)
        segments = self.table.segments
        if watches:
            segments = [(i, i + 1) for begin, end in segments for i in range(begin, end)]
        for begin, end in segments:
            for watch in watches:
                watch.before(begin, state)
            step = self._steps.get(begin)
            if step is not None:
                started = time.perf_counter_ns()
                step(state())
                if ticks is not None:
                    ticks[2 * begin : 2 * begin + 2] = started, time.perf_counter_ns()
            else:
                assert self._native is not None
                failed = self._native.ttx_run(self._records, begin, end, addresses, values, clock)
                if failed:
                    return int(failed)
            for watch in watches:
                watch.after(begin, state)
        return 0
