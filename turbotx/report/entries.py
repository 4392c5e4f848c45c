"""Entries: what a report contains, as frozen records of regions, kernels, launches, GEMMs and so
on.

In: nothing, these are types. Out: records of strings, numbers and tuples of them, so that
`dataclasses.asdict` is ready for JSON. Bytes are given at one shape and as formulas::

    TrafficEntry(read_nbytes=49152, written_nbytes=49152, read="512*batch*seq", written="...")
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrafficEntry:
    """What one launch has to move, in bytes at the report's shape and as formulas in its dims.

    compulsory_nbytes: every needed element read once, every result written once.
    flops: multiply-adds of GEMMs and attention, counted as two; for other kernels, their ops in
    units of one add.
    """

    read_nbytes: int
    written_nbytes: int
    compulsory_nbytes: int
    read_formula: str
    written_formula: str
    flops: int
    flops_formula: str


@dataclass(frozen=True)
class RegionEntry:
    """A region between GEMMs, and the kernels that it became.

    reason: why it took more than one kernel, what these share through memory or recompute, at what
    cost, or which ops ended it; empty if there is nothing to say.
    places: file:line of its ops in the user's source, in order.
    epilogue_of: the GEMMs whose launches compute it.
    apart: why no GEMM computes it, if none does.
    """

    name: str
    nodes: tuple[str, ...]
    ops: tuple[str, ...]
    kernels: tuple[str, ...]
    launches: tuple[str, ...]
    reason: str
    modules: tuple[str, ...]
    places: tuple[str, ...]
    epilogue_of: tuple[str, ...] = ()
    apart: str = ""

    @property
    def became(self) -> tuple[str, ...]:
        """What computes it, as text; the same for equal regions of different layers."""
        if self.kernels:
            return tuple(dict.fromkeys(self.kernels))
        gemms = dict.fromkeys(name.rpartition("_")[0] for name in self.epilogue_of)
        return tuple(f"fused into {name}" for name in gemms) or ("PyTorch's ops",)


@dataclass(frozen=True)
class KernelEntry:
    """One generated function; equal kernels of different layers are one. Traffic is per launch.

    kind: "kernel", "attention", "product", or "gemm" for a GPU's template at the report's shape.
    signature: its params, loops and body in turbotx's notation.
    sources: target language -> text.
    """

    name: str
    kind: str
    signature: str
    sources: dict[str, str]
    launches: tuple[str, ...]
    read_nbytes: int
    written_nbytes: int
    compulsory_nbytes: int
    read_formula: str
    written_formula: str
    flops: int


@dataclass(frozen=True)
class LaunchEntry:
    """One step of the program.

    kernel: the function's name, empty if a library or PyTorch runs it.
    apart: for a kernel between GEMMs, why it is not a GEMM's epilogue.
    """

    name: str
    kind: str
    kernel: str
    module: str
    source: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    traffic: TrafficEntry
    apart: str = ""


@dataclass(frozen=True)
class Gemm:
    """A product (m, k) x (k, n).

    weights: the parameters of its weight, several if they are packed.
    through: "packed weight" on a CPU; the generated kernel or "the library" on a GPU; or the op
    that PyTorch runs.
    """

    name: str
    module: str
    m: int
    k: int
    n: int
    m_formula: str
    weights: tuple[str, ...]
    packed: bool
    through: str


@dataclass(frozen=True)
class Extern:
    """An op that PyTorch runs, with count and reason."""

    op: str
    count: int
    reason: str


@dataclass(frozen=True)
class Placed:
    """A planned buffer: alive in launches begin <= i < end, at `offset` bytes in the arena.

    tensors: those that occupy it one after another through in-place reuse.
    """

    name: str
    nbytes: int
    formula: str
    lifetime: tuple[int, int]
    offset: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Eager:
    """What PyTorch does for the same call in eager mode: launches, and bytes moved by them."""

    launches: int
    moved_nbytes: int


@dataclass(frozen=True)
class EagerMemory:
    """The memory that PyTorch would use for the intermediates of the same ops, see
    `origin.simulate`."""

    peak_nbytes: int
    reserved_nbytes: int
    allocations: int
    method: str


@dataclass(frozen=True)
class Memory:
    """The memory plan at the report's shape, and the memory of weights.

    lower_bound_nbytes: the maximum of live bytes over the launches; of these, scratch_nbytes are
    workspaces that no op of the model needs.
    chunks: (offset, nbytes) each.
    weights_nbytes: the model's parameters.
    derived_nbytes: constants computed from them, such as concatenated Q, K and V.
    packed_nbytes: GEMM weights in the processor's layout, without padding.
    """

    planner: str
    peak_nbytes: int
    lower_bound_nbytes: int
    scratch_nbytes: int
    chunks: tuple[tuple[int, int], ...]
    buffers: tuple[Placed, ...]
    pytorch: EagerMemory
    weights_nbytes: int
    derived_nbytes: int
    packed_nbytes: int

    @property
    def arena_nbytes(self) -> int:
        """Bytes mapped for one call: whole chunks."""
        return max((offset + nbytes for offset, nbytes in self.chunks), default=0)

    @property
    def total_nbytes(self) -> int:
        """Weights, everything derived from them, and one arena; inputs and outputs are the
        caller's."""
        return self.weights_nbytes + self.derived_nbytes + self.packed_nbytes + self.arena_nbytes


@dataclass(frozen=True)
class CacheEntry:
    """The key/value cache of a decoder's call at the report's shape.

    token_nbytes: one position of one sequence, all layers.
    filled_nbytes: the positions filled after the call.
    nbytes: including spare capacity.
    """

    token_nbytes: int
    filled_nbytes: int
    nbytes: int


@dataclass(frozen=True, repr=False)
class NodeEntry:
    """What became of an op of the captured model.

    status: "fused" (computed inside kernels), "view" (folded into addresses), "gemm", "attention",
    "product", "route", "aten", "hoisted" (computed once from parameters), "input", "parameter",
    "output", "merged" (part of another op) or "removed" (unused or a no-op).
    launches: what runs it. The op of a region is "region"; its module and source are those of its
    first op.
    """

    node: str
    op: str
    module: str
    source: str
    status: str
    launches: tuple[str, ...]
    kernels: tuple[str, ...]

    def __str__(self) -> str:
        """Return it as a sentence: `gelu: fused into linear_gelu_0, of encoder.layer.0`."""
        words = {
            "fused": "fused into", "view": "folded into the addresses of", "aten": "by PyTorch in",
            "merged": "part of", "gemm": "a matrix product,", "attention": "attention,",
            "product": "one of attention's products,", "route": "rows put in order by",
            "hoisted": "computed once from parameters",
        }  # fmt: skip
        said = words.get(self.status, self.status)
        runs = ", ".join(self.launches)
        where = f" of {self.module}" if self.module else ""
        source = f" ({self.source})" if self.source else ""
        name = self.node if self.op in ("", self.node) else f"{self.node} ({self.op})"
        return f"{name}: {said}{f' {runs}' if runs else ''}{where}{source}"

    def __repr__(self) -> str:
        return f"<{self}>"
