"""What a report says, as frozen records: one a region, kernel, launch, GEMM, extern and buffer.

In: nothing, these are types. Out: records whose fields are strings, numbers and tuples of them, so
that `dataclasses.asdict` is ready for JSON. Bytes are stated at one shape and as formulas::

    TrafficEntry(read_nbytes=49152, written_nbytes=49152, read="512*batch*seq", written="...")
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrafficEntry:
    """What one launch has to move, in bytes at the report's shape and as formulas in its dims.

    compulsory_nbytes: every element that the launch needs read once, every result written once.
    flops: multiply-adds of GEMMs and attention, counted as two; of other kernels what they compute,
    in adds.
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
    """A run of ops between GEMMs, and the kernels that it became.

    reason: why it took more than one kernel, what these share through memory or compute again, at
    what cost, or which ops ended it; empty where there is nothing to tell. places: file:line of the
    user's source for its ops, in order. epilogue_of: the GEMMs whose launches compute it. apart:
    where none does, why not.
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
        """What computes it, in words, equal for equal regions of different layers."""
        if self.kernels:
            return tuple(dict.fromkeys(self.kernels))
        gemms = dict.fromkeys(name.rpartition("_")[0] for name in self.epilogue_of)
        return tuple(f"fused into {name}" for name in gemms) or ("PyTorch's ops",)


@dataclass(frozen=True)
class KernelEntry:
    """One generated function; equal kernels of different layers are one. Traffic is per launch.

    kind: "kernel", "attention", "product", or "gemm" for a GPU's template at the report's shape.
    signature: its parameters, loops and body in turbotx's own notation. sources: target language ->
    text.
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
    """One step of the program, in running order.

    kernel: the function's name, empty where a library or PyTorch runs it. apart: of a kernel
    between GEMMs, why it is no GEMM's epilogue.
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
    """(m, k) x (k, n); weights: the parameters behind its weight, several where they are packed.

    through: "packed weight" on a CPU; on a GPU the generated kernel, or "the library"; the op where
    PyTorch runs it.
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
    """An op that PyTorch runs, how often, and why."""

    op: str
    count: int
    reason: str


@dataclass(frozen=True)
class Placed:
    """A planned buffer: alive in launches begin <= i < end, at `offset` bytes in the arena.

    tensors: those that lie in it one after another, where a launch writes over what it reads.
    """

    name: str
    nbytes: int
    formula: str
    lifetime: tuple[int, int]
    offset: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Eager:
    """What PyTorch does for the same call, op by op: what it launches, and the bytes those move."""

    launches: int
    moved_nbytes: int


@dataclass(frozen=True)
class EagerMemory:
    """What PyTorch would hold for the intermediates of the same ops; see `origin.simulate`."""

    peak_nbytes: int
    reserved_nbytes: int
    allocations: int
    method: str


@dataclass(frozen=True)
class Memory:
    """The plan at the report's shape, and what the weights take beside it.

    lower_bound_nbytes: the most bytes of these launches that are alive at once, of which
    scratch_nbytes are workspaces that no op of the model asks for. chunks: (offset, nbytes) each.
    weights_nbytes: the model's own; derived_nbytes: constants made of them, as Q, K and V in one;
    packed_nbytes: GEMM weights in the processor's layout, without its padding.
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
        """What is mapped for one call in flight: whole chunks."""
        return max((offset + nbytes for offset, nbytes in self.chunks), default=0)

    @property
    def total_nbytes(self) -> int:
        """Weights, what is made of them, and one arena; inputs and outputs are the caller's."""
        return self.weights_nbytes + self.derived_nbytes + self.packed_nbytes + self.arena_nbytes


@dataclass(frozen=True)
class CacheEntry:
    """The key/value cache of a decoder's call at the report's shape.

    token_nbytes: of one position of one sequence, all layers. filled_nbytes: of those that there
    are after the call. nbytes: with the room that is kept for more.
    """

    token_nbytes: int
    filled_nbytes: int
    nbytes: int


@dataclass(frozen=True, repr=False)
class NodeEntry:
    """Where an op of the captured model went.

    status: "fused" (computed inside kernels), "view" (folded into addresses), "gemm",
    "attention", "product", "route", "aten", "hoisted" (computed once from parameters), "input",
    "parameter", "output", "merged" (became part of another op) or "removed" (nothing needs it, or
    it did nothing). launches: what runs it. A region's op is "region", its module and source are
    those of its first op.
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
