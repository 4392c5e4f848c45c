"""Executable: a program as plain data; it is what runs, what is saved and what is loaded.

In: nothing, these are types; `program.link` makes one from an assembly. Sizes are Python source,
tensors are places in a table of addresses; there is no symbolic algebra and no compiler here::

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
from turbotx.memory.planner.orientation import Orientation

# --- what PyTorch runs ---


@dataclass(frozen=True)
class Window:
    """A strided window on a tensor, in elements; `offset` is one size."""

    tensor: str
    dtype: torch.dtype
    shape: Sizes
    strides: Sizes
    offset: Sizes


@dataclass(frozen=True)
class PytorchCall:
    """A call: args and kwargs nested, a `Window` for each tensor, `Sizes` of one for each size.

    target: an op, or a graph of ops. writes: where its results go, None for one that nothing reads.
    has_out: the op's `out` overload writes the first one itself.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    writes: tuple[Window | None, ...]
    has_out: bool = False


@dataclass(frozen=True)
class LibraryGemm:
    """out = x weight^T + bias by cuBLAS, all of two dims. relu: it does that too. fixed: the call
    may be kept for a shape, since all that it looks at stays where it is."""

    x: Window
    weight: Window
    bias: Window | None
    out: Window
    relu: bool
    fixed: bool


# --- launches ---


@dataclass(frozen=True, kw_only=True)
class LinkedLaunch:
    """A launch with its tensors found. checks: of indices: a tensor whose values must lie in
    [0, limit), and the limit, in words."""

    name: str
    source: str
    writes: tuple[str, ...]
    checks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class NativeLaunch(LinkedLaunch):
    """A function of a library, "runtime" or "kernels". slots: in the table of addresses, -1 for
    none; offsets: in the table of sizes, in bytes, -1 for none; sizes: in the table of sizes."""

    library: str
    symbol: str
    slots: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class QueuedLaunch(LinkedLaunch):
    """A launch of a GPU program. family: index of the family of kernels that selects one by sizes;
    gemm: the library call that is used where that family, or no family, selects it."""

    family: int | None
    gemm: LibraryGemm | None = None


@dataclass(frozen=True, kw_only=True)
class CalledLaunch(LinkedLaunch):
    """A call of PyTorch."""

    call: PytorchCall


# --- what goes in and out ---


@dataclass(frozen=True)
class InputTensor:
    """order: of its dims in memory, None where it is their own. raw: it must be dense."""

    name: str
    dtype: torch.dtype
    shape: Sizes
    order: tuple[int, ...] | None = None
    raw: bool = False


@dataclass(frozen=True)
class OutputTensor:
    """A tensor that every call makes anew."""

    name: str
    dtype: torch.dtype
    shape: Sizes


@dataclass(frozen=True)
class WholeTensor:
    """A leaf of the output that is all of a tensor; other leaves are `Window`s, `ReturnedView`s,
    `Sizes` or constants."""

    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class ReturnedView:
    """A leaf of the output that is an input, as the caller gave it, or a parameter, or a view.

    steps: the calls to make of it, each (op, arguments after the first, keywords).
    """

    root: str
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], ...]


# --- memory and devices ---


@dataclass(frozen=True)
class MemoryTables:
    """Lifetimes of buffers, and the plan tables that a planner has precomputed from them.

    size_class: of every root of `liveness`; class_nbytes: the bytes of each class.
    """

    planner: str
    liveness: Liveness
    size_class: tuple[int, ...]
    class_nbytes: Sizes
    orientations: tuple[Orientation, ...]


@dataclass(frozen=True)
class WeightWindow:
    """A part of a weight, in elements."""

    tensor: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Packing:
    """A packed GEMM weight: its slot in the table of addresses; the parts whose rows it is.

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
    """segments: (begin, end) ranges of native launches, or the index of one that PyTorch runs."""

    segments: tuple[tuple[int, int], ...]
    packings: tuple[Packing, ...]


@dataclass(frozen=True)
class ArgumentLayout:
    """pointers: (slot, place of the offset in bytes or None). cell: what the pointer behind them
    shows: "status" of the launch's index checks, "turns" of split sums, or "". sizes: places in
    the size table."""

    pointers: tuple[tuple[int, int | None], ...]
    cell: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class DeviceCells:
    """What the kernels of a decoder's steps read on the device, so that one graph serves all steps.

    growing: places of the dims that grow with every step; capacity: of what bounds them. values:
    places in the size table of what depends on those dims. cache: the input that is written in
    place; windows: on it, (slot, place of the offset in bytes or None).
    """

    growing: tuple[int, ...]
    capacity: int
    values: tuple[int, ...]
    cache: str
    windows: tuple[tuple[int, int | None], ...]


@dataclass(frozen=True)
class GpuTables:
    """layouts: by launch and list of arguments, where the arguments of its kernels lie. checks: how
    many each launch makes. turns: counters that split sums share. depends: kernels wait by
    themselves for those before them. cells: of a decoder's steps."""

    target: str
    layouts: tuple[tuple[int, str, ArgumentLayout], ...]
    checks: tuple[int, ...]
    turns: int
    depends: bool
    cells: DeviceCells | None = None


@dataclass(frozen=True)
class TokenRange:
    """The calls of one of several programs: those whose largest number of tokens belongs to one of
    some buckets, of all that there are. structure: under which tuning keeps the choice."""

    tokens: Sizes
    dims: tuple[str, ...]
    buckets: frozenset[int]
    every: tuple[int, ...]
    structure: str = ""

    def holds(self, dims: Sequence[int]) -> bool:
        """Return whether a call of these dims is among them."""
        return self.bucket(dims) in self.buckets

    def bucket(self, dims: Sequence[int]) -> int:
        """Return the bucket that decides at these dims; the last one holds all larger numbers."""
        tokens = max(self._evaluate(*dims))
        return next((b for b in self.every if tokens <= b), self.every[-1])

    def buckets_of(self, tokens: Sizes) -> Collection[int]:
        """Return the buckets in which a number of tokens can be, in such a call."""
        return sorted(self.buckets) if self.tokens == tokens else self.every

    @cached_property
    def _evaluate(self) -> Evaluate:
        return self.tokens.compile(self.dims)


@dataclass(frozen=True)
class Executable:
    """One captured call, or some of its shapes, compiled for one target.

    values: the table of sizes. requirements: negative where an index cannot fit, each with its
    words. slots: the place of every tensor in the table of addresses. weights: the parameters and
    hoisted constants that are read as they are. leaves: of the output, in order. token_range: the
    calls that it serves, None: all.
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
