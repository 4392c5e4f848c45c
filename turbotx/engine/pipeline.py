"""The pipeline: a captured call becomes a program, one stage a line.

In: a `Captured` and options. Out: a `Compiled`: what every stage made, and the program::

    capture -> canonicalize -> rewrite -> partition -> fuse -> epilogues -> assemble
        -> fold norms, alternatives (on a GPU) -> build -> plan -> Program

On a GPU a second program, whose norms are folded into GEMMs, may serve the calls of few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from turbotx.capture.trace import Captured
from turbotx.ir import verifier as verify
from turbotx.kernels.fusion.epilogue import find_epilogues
from turbotx.kernels.fusion.fuse import FusedRegion, fuse_all
from turbotx.kernels.fusion.norm_folding import find_folds
from turbotx.memory.pool import ChunkPool
from turbotx.options import Options
from turbotx.passes.attention import recognize_attention
from turbotx.passes.cache import store_in_place
from turbotx.passes.canonicalize import canonicalize
from turbotx.passes.known import require_known_sizes
from turbotx.passes.linear import (
    free_biases,
    lift_permutations,
    lift_views,
    pack_linears,
    use_linear,
    use_multiplication,
)
from turbotx.passes.outputs import own_outputs
from turbotx.passes.partition import find_prepared, kind_of, partition
from turbotx.passes.results import use_single_results
from turbotx.program.assemble import Assembly, assemble
from turbotx.program.fold_norms import assemble_folded
from turbotx.program.gemm_fallback import add_alternatives
from turbotx.runtime.cpu.runtime import CpuRuntime
from turbotx.runtime.cuda.cuda_graphs import GraphCache
from turbotx.runtime.cuda.dispatch import Share, make_tiles, share_calls
from turbotx.runtime.cuda.program import CudaGraphProgram
from turbotx.runtime.cuda.runtime import CudaRuntime, build_expected
from turbotx.runtime.device import Device
from turbotx.runtime.program import Program
from turbotx.runtime.weights import Kind, Weights


@dataclass
class Compiled:
    """A program and the stages it came from, for reports."""

    captured: Captured
    captured_text: str
    graph: fx.Graph
    prepared: frozenset[fx.Node]
    fused: list[FusedRegion]
    assembly: Assembly
    program: Program
    # Itself, and on a GPU perhaps the same call with norms folded: each serves some shapes.
    specializations: tuple[Compiled, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.specializations = (self,)

    def at(self, dims: Sequence[int]) -> Compiled:
        """Return this or its twin: the one that serves a shape."""
        return next(x for x in self.specializations if x.program.serves(dims))


def rewrite(graph: fx.Graph, attention: str = "auto") -> None:
    """Run the graph passes, each a file of `passes/`, in order.

    attention: the option of that name.
    """
    use_single_results(graph)
    canonicalize(graph)
    use_multiplication(graph)
    use_linear(graph)
    pack_linears(graph)
    recognize_attention(graph, attention)
    canonicalize(graph)
    store_in_place(graph)
    lift_permutations(graph)
    canonicalize(graph)
    lift_views(graph)
    free_biases(graph)
    canonicalize(graph)
    own_outputs(graph)


def compile_captured(
    captured: Captured, model: nn.Module, options: Options, pool: ChunkPool,
    device: Device | None = None,
) -> Compiled:  # fmt: skip
    """Compile one captured call; `model` owns the parameters, `pool` the memory.

    device: the GPU that it runs on; without one it runs on the CPU.
    """
    graph = captured.graph_module.graph
    text = str(graph)
    rewrite(graph, options.attention)
    return compile_rewritten(captured, text, model, options, pool, device)


def compile_rewritten(
    captured: Captured, text: str, model: nn.Module, options: Options, pool: ChunkPool,
    device: Device | None = None,
) -> Compiled:  # fmt: skip
    """Compile a captured call that the passes have been over, perhaps for another device before.

    text: the graph as it was captured.
    """
    graph = captured.graph_module.graph
    require_known_sizes(graph, captured.dims, captured.name)
    verify.check_graph(graph)
    verify.check_inputs(graph, captured.input_sizes)
    prepared = find_prepared(graph)
    regions = partition(graph, prepared)
    for region in regions:
        verify.check_region(region.nodes, region.outputs)
    fused = fuse_all(graph, regions, prepared)
    kinds = {n: kind_of(n, prepared) for n in graph.nodes}
    chooses = device is not None and options.backend != "aten" and options.gemms != "cublas"
    joins = options.epilogues and (device is None or chooses)
    epilogues = find_epilogues(fused, kinds) if joins else {}
    joined = {e.output for e in epilogues.values()} if device is None else set()
    kernels = [k for f in fused if f.region.outputs[-1] not in joined for k in f.kernels]
    for kernel in {k.kernel.digest(): k.kernel for k in kernels}.values():
        verify.check_kernel(kernel)
    assembled = [(fused, assemble(graph, fused, prepared, captured.dims, epilogues), epilogues)]
    may_fold = chooses and joins and options.norms != "store"
    folds = find_folds(fused, kinds, epilogues) if may_fold else {}
    if folds:
        assembled.append(assemble_folded(graph, fused, prepared, captured.dims, epilogues, folds))
    for parts, assembly, ends in assembled:
        if chooses:
            add_alternatives(assembly, parts, ends)
        verify.check_launches(assembly.tensors, assembly.launches, assembly.returned)
    bind = _Binder(captured, model, options, pool, device)
    tiles = None if device is None else make_tiles(options, device)
    shares = share_calls([a for _, a, _ in assembled], captured.dims, tiles)
    return join_specializations(
        [
            Compiled(captured, text, graph, prepared, parts, assembly, bind(assembly, share))
            for (parts, assembly, _), share in zip(assembled, shares, strict=True)
            if share is None or share.buckets
        ]
    )


def bind_weights(
    compiled: Compiled, model: nn.Module, options: Options, pool: ChunkPool,
    device: Device | None = None,
) -> Compiled:  # fmt: skip
    """Return the same compiled call for another module of the same structure; traces nothing."""
    bind = _Binder(compiled.captured, model, options, pool, device)
    return join_specializations(
        [replace(x, program=bind(x.assembly, x.program.share)) for x in compiled.specializations]
    )


def join_specializations(specializations: list[Compiled]) -> Compiled:
    """Let programs of one call know each other, and build their kernels; return the first."""
    for compiled in specializations:
        compiled.specializations = tuple(specializations)
    runtimes = [x.program.runtime for x in specializations]
    gpu = [r for r in runtimes if isinstance(r, CudaRuntime)]
    if gpu:
        build_expected(gpu, specializations[0].captured.example_dims)
    return specializations[0]


class _Binder:
    """Binds assemblies of one call to a device; their graphs count together."""

    def __init__(
        self, captured: Captured, model: nn.Module, options: Options, pool: ChunkPool,
        device: Device | None,
    ) -> None:  # fmt: skip
        self.captured, self.model, self.options = captured, model, options
        self.pool, self.device = pool, device
        self.graphs = GraphCache(options.max_graphs if options.cuda_graphs else 0)

    def __call__(self, assembly: Assembly, share: Share | None) -> Program:
        options, dims = self.options, self.captured.dims
        weights = find_weights(self.captured, self.model, assembly)
        kept = (self.pool, options.planner, options.max_shapes)
        if self.device is None:
            return Program(assembly, dims, CpuRuntime(assembly, weights, options, dims), *kept)
        gpu = CudaRuntime(assembly, weights, options, dims, self.device, share)
        return CudaGraphProgram(assembly, dims, gpu, *kept, graphs=self.graphs)


def find_weights(captured: Captured, model: nn.Module, assembly: Assembly) -> Weights:
    """Say where the parameters live: in the user's own module, so that its updates are seen."""
    nodes = {n.name: n for n in captured.graph_module.graph.nodes if n.op == "get_attr"}
    paths = captured.graph_module.meta["paths"]
    targets = {name: paths[node.target] for name, node in nodes.items()}
    lifted = (
        captured.graph_module.get_submodule("constants")
        if any(t.startswith("constants.") for t in targets.values())
        else nn.Module()
    )
    kinds = {name: Kind.of(node.meta["val"]) for name, node in nodes.items()}
    # Not named_buffers(): that leaves out a tensor's second name.
    held = {**lifted._buffers, **lifted._parameters}
    constants = {name: tensor for name, tensor in held.items() if tensor is not None}
    return Weights(model, constants, targets, assembly.prepared, kinds)
