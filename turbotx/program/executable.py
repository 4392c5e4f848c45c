"""Executable: a program as plain data, which is what runs and what is saved and loaded.

In: nothing, these are types; `program.link` makes one from an assembly. Sizes are Python source,
tensors are indices into a table of addresses; no sympy and no compiler is needed to run it::

    Executable(dims=("batch", "seq"), values=Sizes(("batch * seq", ...)), launches=(...), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from turbotx.ir.sizes import Evaluate, Sizes
from turbotx.memory.liveness import Liveness
from turbotx.memory.planner import Workload, restore_planner
from turbotx.memory.planner.orientation import Orientation
from turbotx.memory.planner.plan import Planner

CONTIGUOUS_CACHE = "contiguous memory of a cache: a table of one column"
"""What a program requires that reads no blocks of a decoder's cache."""

# --- calls of PyTorch ---


@dataclass(frozen=True)
class Window:
    """A strided window on a tensor, in elements; `offset` holds one size."""

    tensor: str
    dtype: torch.dtype
    shape: Sizes
    strides: Sizes
    offset: Sizes


@dataclass(frozen=True)
class PytorchCall:
    """A call of a PyTorch op or of a graph of ops.

    args, kwargs: nested; a `Window` for each tensor, a `Sizes` of one for each size.
    writes: where its results go, None for an unused one.
    has_out: the op's `out` overload writes the first result.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    writes: tuple[Window | None, ...]
    has_out: bool = False


@dataclass(frozen=True)
class LibraryGemm:
    """out = x weight^T + bias by cuBLAS; all operands are 2-D.

    relu: applied to the result.
    fixed: the call may be cached per shape, since its addresses do not change.
    """

    x: Window
    weight: Window
    bias: Window | None
    out: Window
    relu: bool
    fixed: bool


# --- launches ---


@dataclass(frozen=True, kw_only=True)
class LinkedLaunch:
    """A launch over slots of the address table.

    checks: tensors of indices, each with the limit (as text) below which its values must lie.
    """

    name: str
    source: str
    writes: tuple[str, ...]
    checks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class NativeLaunch(LinkedLaunch):
    """A function of a native library: "kernels", or one of `runtime.cpu.abi.SOURCES`.

    slots: indices into the table of addresses, -1 for none.
    offsets: indices into the table of sizes, in bytes, -1 for none.
    sizes: indices into the table of sizes.
    """

    library: str
    symbol: str
    slots: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class QueuedLaunch(LinkedLaunch):
    """A launch of a GPU program.

    family: index of the kernel family that selects a kernel by sizes.
    gemm: the library call used if the family selects it, or if there is no family.
    """

    family: int | None
    gemm: LibraryGemm | None = None


@dataclass(frozen=True, kw_only=True)
class CalledLaunch(LinkedLaunch):
    """A launch that calls PyTorch."""

    call: PytorchCall


# --- inputs and outputs ---


@dataclass(frozen=True)
class InputTensor:
    """A tensor argument of a call.

    order: the order of its dims in memory, None if contiguous.
    raw: it must be dense. exact: so must the strides of its dims of size 1.
    """

    name: str
    dtype: torch.dtype
    shape: Sizes
    order: tuple[int, ...] | None = None
    raw: bool = False
    exact: bool = False


@dataclass(frozen=True)
class OutputTensor:
    """A tensor that every call allocates."""

    name: str
    dtype: torch.dtype
    shape: Sizes


@dataclass(frozen=True)
class WholeTensor:
    """A leaf of the output that is a whole tensor; other leaves are `Window`s, `ReturnedView`s,
    `Sizes` or constants."""

    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class ReturnedView:
    """A leaf of the output that is an input object or a parameter, or a view of one.

    steps: the view ops to apply, each (op, arguments after the first, keywords).
    """

    root: str
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], ...]


# --- memory and devices ---


@dataclass(frozen=True)
class MemoryTables:
    """Lifetimes of buffers, and the plan tables that the planner precomputed from them.

    size_class: by root of `liveness`, the index of its size class.
    class_nbytes: bytes of each class.
    """

    planner: str
    liveness: Liveness
    size_class: tuple[int, ...]
    class_nbytes: Sizes
    orientations: tuple[Orientation, ...]

    def restore_planner(self) -> Planner:
        """Return the planner of these tables."""
        workload = Workload(self.liveness.lifetimes, self.size_class, self.liveness.names)
        return restore_planner(self.planner, workload, self.orientations)


@dataclass(frozen=True)
class WeightWindow:
    """A strided part of a weight, in elements."""

    tensor: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Packing:
    """A packed GEMM weight.

    sources, scale: of one of integers, the parts of which its rows are quantised, and the tensor of
    their scales; empty where other things are done to parameters first, but for int4's scales.
    group, depth: of int4, how many inputs share a scale, and how many there are.
    """

    slot: int
    parts: tuple[WeightWindow, ...]
    gated: bool
    sources: tuple[WeightWindow, ...] = ()
    scale: str = ""
    group: int = 0
    depth: int = 0


@dataclass(frozen=True)
class CpuTables:
    """Tables of a CPU program.

    segments: (begin, end) ranges of native launches, or the index of one launch run by PyTorch.
    """

    segments: tuple[tuple[int, int], ...]
    packings: tuple[Packing, ...]


@dataclass(frozen=True)
class ArgumentLayout:
    """Where the arguments of a kernel lie.

    pointers: (slot, index of the byte offset or None).
    cell: the memory that one more pointer refers to: "status" of index checks, "turns" of split
    sums, or "".
    sizes: indices into the size table.
    """

    pointers: tuple[tuple[int, int | None], ...]
    cell: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class DeviceCells:
    """What the kernels of a decoder's steps read on the device, so that one graph serves all steps.

    growing: places of the dims that grow with every step; room: of those whose product bounds
    them, the rows of a cache's block and the columns of its table. values: places in the size table
    of what depends on those dims. cache: the input that is written in place; slot: its place in the
    table of addresses.
    """

    growing: tuple[int, ...]
    room: tuple[int, int]
    values: tuple[int, ...]
    cache: str
    slot: int


@dataclass(frozen=True)
class GpuTables:
    """Tables of a GPU program.

    layouts: (launch, variant of the argument list, argument layout).
    checks: number of index checks of each launch.
    turns: number of counters shared by split sums.
    depends: kernels wait on the device for the preceding ones (programmatic dependent launch).
    cells: of a decoder's steps.
    """

    target: str
    layouts: tuple[tuple[int, str, ArgumentLayout], ...]
    checks: tuple[int, ...]
    turns: int
    depends: bool
    cells: DeviceCells | None = None


@dataclass(frozen=True)
class TokenRange:
    """The calls that one of several programs serves: those whose largest token count falls into one
    of `buckets`.

    every: all buckets.
    structure: key under which tuning stores the choice.
    """

    tokens: Sizes
    dims: tuple[str, ...]
    buckets: frozenset[int]
    every: tuple[int, ...]
    structure: str = ""

    def holds(self, dims: Sequence[int]) -> bool:
        """Return whether it includes a call with these dims."""
        return self.bucket(dims) in self.buckets

    def bucket(self, dims: Sequence[int]) -> int:
        """Return the bucket of a call with these dims; the last one also holds all larger
        counts."""
        tokens = max(self._evaluate(*dims))
        return next((b for b in self.every if tokens <= b), self.every[-1])

    def buckets_of(self, tokens: Sizes) -> Collection[int]:
        """Return the buckets that a number of tokens can fall into in such a call."""
        return sorted(self.buckets) if self.tokens == tokens else self.every

    @cached_property
    def _evaluate(self) -> Evaluate:
        return self.tokens.compile(self.dims)


@dataclass(frozen=True)
class Executable:
    """One captured call, or a range of its shapes, compiled for one target.

    values: the table of sizes.
    requirements: sizes that must not be negative, with their texts.
    slots: the index of every tensor in the table of addresses.
    weights: parameters and hoisted constants that are read unpacked.
    leaves: of the output, in order.
    token_range: the calls that it serves, None for all.
    """

    dims: tuple[str, ...]
    values: Sizes
    requirements: Sizes
    requirement_texts: tuple[str, ...]
    slots: Mapping[str, int]
    inputs: tuple[InputTensor, ...]
    outputs: tuple[OutputTensor, ...]
    weights: tuple[str, ...]
    launches: tuple[LinkedLaunch, ...]
    leaves: tuple[Any, ...]
    memory: MemoryTables
    cpu: CpuTables | None = None
    gpu: GpuTables | None = None
    token_range: TokenRange | None = None

    @property
    def least_columns(self) -> int:
        """How few columns a cache's block table has that it reads, 0 where it reads none: one on a
        GPU, two on a CPU, where one stands for contiguous memory."""
        if CONTIGUOUS_CACHE in self.requirement_texts:
            return 0
        return 2 if self.gpu is None else 1
