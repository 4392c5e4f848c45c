"""The GPU runtime: Triton kernels launched straight, GEMMs and what else through PyTorch.

In: an assembly, the program's weights and a device. Out: something that runs it over an address
table, as the CPU runtime does; nothing is allocated, and nothing waits for the device::

    failed = runtime.run(table, sizes, state)   # 0, or which launch met an index out of range
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from turbotx import ir
from turbotx.assemble import Assembly
from turbotx.errors import InputError
from turbotx.kernels.targets import Job
from turbotx.kernels.tuned import load_tuned, make_chooser
from turbotx.options import Options
from turbotx.runtime.aten import AtenSteps
from turbotx.runtime.cuda_gemm import bind_gemm
from turbotx.runtime.cuda_launch import AttentionFamily, KernelFamily, SizeTable
from turbotx.runtime.device import Device, Grid
from turbotx.runtime.state import RunState
from turbotx.runtime.watch import Watch
from turbotx.runtime.weights import Weights
from turbotx.sizes import compile_evaluator

# Sequence lengths whose kernels are built before the first run: below and at the edges of the
# tiles for run-time lengths, with and without sizes that allow 128-bit accesses.
EXPECTED_LENGTHS = (16, 17, 256, 250, 512, 500)
# Shapes whose views of GEMM operands are kept, an arena.
KEPT_SHAPES = 16
# Arguments that Triton's calling convention adds behind a kernel's own, with room to spare.
EXTRA_ARGUMENTS = 4

Family = KernelFamily | AttentionFamily


class CudaRuntime:
    """Loads a program's kernels on a device and queues its launches.

    builds: how many kernels had to be compiled. sources: the Triton source by kernel and tile.
    """

    def __init__(
        self, assembly: Assembly, weights: Weights, options: Options, dims: Sequence[str],
        device: Device, example_dims: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.assembly, self.weights, self.device = assembly, weights, device
        self.torch_device = device.torch_device
        self.builds = 0
        self.sources: dict[str, str] = {}
        self._dims = tuple(dims)
        self._functions: dict[int, tuple[Job, Any]] = {}
        launches = assembly.launches
        self.table = SizeTable(list(assembly.tensors))
        self.families = self._find_families(options)
        self._layouts = {i: self._layout(launches[i], f) for i, f in self.families.items()}
        steps = AtenSteps(dims)
        outside = {n for n, t in assembly.tensors.items() if t.kind in ("input", "output")}
        self._gemms, self._steps = {}, {}
        for i, launch in enumerate(launches):
            if launch.kind == "gemm":
                fixed = not outside & {a.tensor for a in launch.args if a is not None}
                self._gemms[i] = (bind_gemm(launch, steps), fixed)
            elif i not in self.families:
                self._steps[i] = steps.make(launch)
        self._status = device.new_status(max(1, len(launches)))
        self._status_seen = self._status.numpy()
        self._lock = threading.Lock()
        self._kept: tuple[int, dict[str, torch.Tensor]] = (-1, {})
        self._build_expected(example_dims)

    @property
    def slot_count(self) -> int:
        """How many addresses its table holds."""
        return len(self.table.slots)

    # --- kernels ---

    def _find_families(self, options: Options) -> dict[int, Family]:
        found: dict[int, Family] = {}
        if options.backend == "aten":
            return found
        kernels: dict[str, KernelFamily] = {}
        target = self.device.target
        choose = make_chooser(tuple(options.schedules), target, load_tuned(self.device.describe()))  # type: ignore[arg-type]
        for i, launch in enumerate(self.assembly.launches):
            if isinstance(launch.target, ir.Kernel):
                digest = launch.target.digest()
                if digest not in kernels:
                    kernels[digest] = KernelFamily(launch.target, target, self.table, choose)
                found[i] = kernels[digest]
            elif launch.kind in ("attention", "product"):
                found[i] = AttentionFamily(launch, target, self.table)
        return found

    def _layout(self, launch: ir.Launch, family: Family) -> _Layout:
        """Say where a launch's arguments lie, in the order of its signature."""
        pointers = []
        for arg in launch.args:
            if arg is not None:
                shift = arg.offset * arg.dtype.itemsize
                pointers.append(
                    (self.table.slots[arg.tensor], None if shift == 0 else self.table.value(shift))
                )
        checked = isinstance(family, KernelFamily) and any(
            isinstance(s, ir.Check) for s in family.kernel.body
        )
        return _Layout(pointers, checked, [self.table.value(e) for e in launch.sizes])

    def _build_expected(self, example_dims: Sequence[int]) -> None:
        """Build, in parallel and before the first run, what the shapes to expect will need."""
        evaluate = compile_evaluator(list(self.table.values), self._dims)
        first = [tuple(example_dims)] if example_dims else []
        shapes = [evaluate(*dims) for dims in [*first, *expected_dims(self._dims)]]
        self._load([f.pick(sizes)[0] for sizes in shapes for f in self.families.values()])

    def _load(self, jobs: Sequence[Job]) -> list[Any]:
        """Return the functions of jobs, which are few objects however many launches there are."""
        new = {id(job): job for job in jobs if id(job) not in self._functions}
        if new:
            functions, compiled = self.device.load(list(new.values()))
            self.builds += compiled
            for job, function in zip(new.values(), functions, strict=True):
                self._functions[id(job)] = (job, function)
                tiles = "".join(f"_{name.lower()}{value}" for name, value in job.constexprs)
                self.sources[job.name + tiles] = job.source
        return [self._functions[id(job)][1] for job in jobs]

    def _bind(self, sizes: Any) -> _Bound:
        """Return the functions and grids for a shape, kept with its sizes."""
        bound: _Bound | None = getattr(sizes, "bound", None)
        if bound is None:
            picked = {i: family.pick(sizes) for i, family in self.families.items()}
            functions = self._load([job for job, _ in picked.values()])
            grids = [grid for _, grid in picked.values()]
            bound = _Bound(dict(zip(picked, zip(functions, grids, strict=True), strict=True)))
            sizes.bound = bound
        return bound

    def queue(self, launch: int, job: Job, grid: Grid, table: Any) -> None:
        """Queue one launch by another variant of its kernel, on a table that `run` has used."""
        (function,) = self._load([job])
        if 0 not in grid:
            stream = self.device.stream()
            self.device.launch(function, grid, table.frame.addresses[launch], stream)

    # --- weights ---

    def fill_weights(self, table: Any) -> tuple[int, object]:
        """Write the addresses of everything made from parameters into a table.

        Returns their version, and what must be kept alive as long as the table is used. Raises
        InputError where a parameter lies on another device.
        """
        with self._lock:
            version, tensors = self.weights.version, self.weights.tensors
            if self._kept[0] != version:
                moved = {n: self._place(n, t) for n, t in tensors.items()}
                self._kept = (version, moved)
            kept = self._kept[1]
        for name, tensor in kept.items():
            if name in self.table.slots:
                table[self.table.slots[name]] = tensor.data_ptr()
        # A storage outlives the parameter that may let go of it while a graph still reads it.
        return version, [t.untyped_storage() for t in kept.values()]

    def _place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that kernels can read: here, and where 16 bytes may be loaded at once."""
        if tensor.device != self.torch_device:
            if tensor.numel() != 1:
                raise InputError(
                    f"parameter {name} is on {tensor.device}, and the call's inputs are on "
                    f"{self.torch_device}: move the whole model there with .to(...)"
                )
            return tensor.to(self.torch_device)
        return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()

    # --- running ---

    def run(
        self, table: Any, sizes: Any, state: RunState,
        ticks: Any = None, watches: Sequence[Watch] = (),
    ) -> int:  # fmt: skip
        """Queue every launch in order on the current stream.

        Returns 0, or launch << 32 | code where a kernel has met an index out of range, which may
        have been in an earlier call. `ticks` takes nanoseconds on the device at which each launch
        began and ended, and waits for them. `watches` are told of each launch as it is queued.
        """
        bound = self._bind(sizes)
        frame = self._frame(table, sizes)
        views = frame.views(bound, (state.arena.data_ptr(), self.weights.version))
        moments = []
        with self.device.active():
            stream = self.device.stream()
            for i in range(len(self.assembly.launches)):
                for watch in watches:
                    watch.before(i, state)
                began = None if ticks is None else self.device.clock()
                kernel = bound.kernels.get(i)
                if kernel is None:
                    self.device.call(self._step(i, state, views))
                elif 0 not in kernel[1]:
                    self.device.launch(*kernel, frame.addresses[i], stream)
                if began is not None:
                    moments.append((i, began, self.device.clock()))
                for watch in watches:
                    watch.after(i, state)
        for i, began, ended in moments:
            ticks[2 * i], ticks[2 * i + 1] = began(), ended()
        return self.failed()

    def failed(self) -> int:
        """Return and forget what a kernel has reported by now, without waiting for any."""
        if not self._status_seen.any():
            return 0
        launch = int(np.flatnonzero(self._status_seen)[0])
        check = int(self._status_seen[launch])
        self._status_seen[launch] = 0
        return (launch + 1) << 32 | check

    def _step(
        self, i: int, state: RunState, views: dict[int, Callable[[], object]]
    ) -> Callable[[], object]:
        """Return PyTorch's part; that of a GEMM over planned memory is kept for the next call."""
        if i in views:
            return views[i]
        gemm = self._gemms.get(i)
        if gemm is None:
            step = self._steps[i]
            return lambda: step(state)
        bound = gemm[0](state)
        if gemm[1]:
            views[i] = bound
        return bound

    def _frame(self, table: Any, sizes: Any) -> _Frame:
        """Return the arguments of every kernel at one table, brought up to date."""
        frame: _Frame | None = getattr(table, "frame", None)
        if frame is None:
            frame = table.frame = _Frame(table, self._layouts, len(sizes), self._status)
        frame.refill(sizes)
        return frame


def expected_dims(dims: Sequence[str]) -> Iterable[tuple[int, ...]]:
    """Shapes for which kernels are built ahead; the first dim is the batch, as are others' _d0."""
    for length in EXPECTED_LENGTHS:
        batch = 16 if length % 16 == 0 else 1
        yield tuple(batch if k == 0 or "_d0" in n else length for k, n in enumerate(dims))


class _Layout:
    """pointers: (slot, place of the offset in bytes or None). sizes: places in the size table."""

    def __init__(
        self, pointers: list[tuple[int, int | None]], checked: bool, sizes: list[int]
    ) -> None:
        self.pointers, self.checked, self.sizes = pointers, checked, sizes


class _Bound:
    """A shape's compiled functions and grids, by launch."""

    def __init__(self, kernels: dict[int, tuple[Any, Grid]]) -> None:
        self.kernels = kernels


class _Frame:
    """Argument arrays over one address table: the driver reads through them, launch by launch.

    Whole tensors are read from the table itself, windows from `shifted`, sizes from `sizes`.
    """

    def __init__(
        self, table: Any, layouts: dict[int, _Layout], count: int, status: torch.Tensor
    ) -> None:
        self._table = np.ctypeslib.as_array(table)
        self._sizes = np.zeros(max(1, count), dtype=np.int64)
        windows = dict.fromkeys(
            p for layout in layouts.values() for p in layout.pointers if p[1] is not None
        )
        self._bases = np.array([slot for slot, _ in windows], dtype=np.int64)
        self._shifts = np.array([shift for _, shift in windows], dtype=np.int64)
        self._shifted = np.zeros(max(1, len(windows)), dtype=np.int64)
        self._places = {p: 8 * k for k, p in enumerate(windows)}
        launches = max(layouts, default=-1) + 1
        self._status = status  # what the addresses below point at
        self._statuses = status.data_ptr() + 4 * np.arange(max(1, launches), dtype=np.int64)
        self._nothing = np.zeros(1, dtype=np.int64)
        self.addresses = {i: self._array(i, layout) for i, layout in layouts.items()}
        self._stamp: object = None
        self._views: OrderedDict[int, tuple[_Bound, dict[int, Callable[[], object]]]]
        self._views = OrderedDict()

    def _array(self, i: int, layout: _Layout) -> Any:
        table, shifted = self._table.ctypes.data, self._shifted.ctypes.data
        found = [
            table + 8 * p[0] if p[1] is None else shifted + self._places[p] for p in layout.pointers
        ]
        found += [self._statuses.ctypes.data + 8 * i] * layout.checked
        # A size that a kernel takes in 32 bits is the low half of its 64.
        found += [self._sizes.ctypes.data + 8 * k for k in layout.sizes]
        found += [self._nothing.ctypes.data] * EXTRA_ARGUMENTS
        return (ctypes.c_void_p * len(found))(*found)

    def refill(self, sizes: Any) -> None:
        """Take over a shape's sizes, and the table's addresses as they are now."""
        self._sizes[: len(sizes)] = sizes
        if len(self._bases):
            self._shifted[:] = self._table[self._bases] + self._sizes[self._shifts]

    def views(self, bound: _Bound, stamp: object) -> dict[int, Callable[[], object]]:
        """Return the steps kept for a shape, none of which outlive the memory they look at."""
        if self._stamp != stamp:
            self._views.clear()
            self._stamp = stamp
        kept = self._views.pop(id(bound), (bound, {}))
        self._views[id(bound)] = kept
        if len(self._views) > KEPT_SHAPES:
            self._views.popitem(last=False)
        return kept[1]
