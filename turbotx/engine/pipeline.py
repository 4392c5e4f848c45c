"""The pipeline: a captured call becomes a program for a target, one stage a line.

In: a `Captured`, options, a target. Out: an `UnboundProgram`, which needs neither parameters nor
the device; its GPU jobs at any shape; and bound to both, a `Compiled`::

    capture -> rewrite (-> pack) -> partition -> fuse -> epilogues -> assemble, fold norms
        -> GEMM fallbacks -> ranges of tokens -> kernels (on a CPU: build) -> link, plan -> bind
        -> build ahead (GPU)
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import fx, nn

from turbotx import ir
from turbotx.capture.trace import Captured
from turbotx.engine.compiled import AssembledCall, Compiled, Specialization, UnboundProgram
from turbotx.engine.gemm_roles import GemmRoles
from turbotx.errors import InputError, OptionsError
from turbotx.ir import verifier as verify
from turbotx.kernels.fusion.epilogue import find_epilogues
from turbotx.kernels.fusion.fuse import FusedRegion, fuse_all
from turbotx.kernels.fusion.norm_folding import find_folds
from turbotx.kernels.fusion.quantized_rows import place_quantization, quantize_all_rows
from turbotx.memory.pool import ChunkPool
from turbotx.options import Options
from turbotx.passes.attention import recognize_attention
from turbotx.passes.cache import store_in_place
from turbotx.passes.canonicalize import canonicalize
from turbotx.passes.diagonals import use_diagonals
from turbotx.passes.experts import use_experts
from turbotx.passes.known_sizes import require_known_sizes
from turbotx.passes.linear import (
    free_biases,
    lift_permutations,
    lift_views,
    pack_linears,
    use_linear,
    use_multiplication,
)
from turbotx.passes.outputs import own_outputs
from turbotx.passes.pack import TOKENS, PackedCapture, pack
from turbotx.passes.pack_check import check_packed
from turbotx.passes.partition import Region, find_hoisted, kind_of, partition
from turbotx.passes.products import use_products
from turbotx.passes.quantize import Quantization, check_target, quantize_linears
from turbotx.passes.quantize_check import check_quantized
from turbotx.passes.quantized_pairs import has_pairs, use_int8_pairs
from turbotx.passes.results import use_single_results
from turbotx.passes.rising import drop_packed_sequences
from turbotx.program.assemble import assemble
from turbotx.program.assembly import Assembled, Assembly
from turbotx.program.cache_stores import fuse_stores, use_contiguous
from turbotx.program.fold_norms import assemble_folded
from turbotx.program.gemm_fallback import add_gemm_fallbacks
from turbotx.program.row_peaks import assemble_with_peaks
from turbotx.program.steps import add_split_workspaces, find_steps
from turbotx.runtime.cpu.runtime import CpuCode, CpuRuntime, build_for_cpu
from turbotx.runtime.cuda.cuda_graphs import GraphCache
from turbotx.runtime.cuda.dispatch import choose_ranges, make_tiles
from turbotx.runtime.cuda.runtime import CudaRuntime, LaunchJob, LaunchKernels, build_expected
from turbotx.runtime.device import Device
from turbotx.runtime.make_program import make_program
from turbotx.runtime.program import Program
from turbotx.runtime.weights import Kind, Place, Weights

log = logging.getLogger("turbotx.fusion")


def compile_captured(
    captured: Captured, options: Options, target: str = "cpu", gpu: str = ""
) -> UnboundProgram:
    """Compile a captured call for "cpu" or a GPU such as "sm_90", which need not be present.

    The captured graph is rewritten, once for all targets.
    gpu: the device's name, used to look up tuned schedules. Raises TurbotxError for what the
    passes, the checkers or the compiler refuse.
    """
    return schedule(assemble_call(captured, options, target), options, target, gpu)


def jobs(program: UnboundProgram, dims: Sequence[int]) -> list[LaunchJob]:
    """Return the GPU kernels that a program launches at one shape, in launch order; empty on a CPU,
    whose code is built once for all shapes."""
    code = program.at(dims).code
    return list(code.at(dims)) if isinstance(code, LaunchKernels) else []


# --- to launches ---


def rewrite(
    graph: fx.Graph, attention: str = "auto", quantization: Quantization | None = None,
    pairs: bool = True,
) -> None:  # fmt: skip
    """Run the graph passes, each a file of `passes/`, in order.

    attention: the option of that name. pairs: whether those of PyTorch's quantiser become int8.
    `canonicalize` runs again where the next pass matches one form only; 3 to 12 ms each.
    """
    use_single_results(graph)
    drop_packed_sequences(graph)
    canonicalize(graph)
    use_multiplication(graph)
    use_linear(graph)
    if found := pairs and has_pairs(graph):
        use_int8_pairs(graph)
    use_experts(graph)
    pack_linears(graph, None if quantization is None else quantization.kind_of)
    recognize_attention(graph, attention)
    use_diagonals(graph)
    use_products(graph)
    canonicalize(graph)
    store_in_place(graph)
    lift_permutations(graph)
    canonicalize(graph)
    lift_views(graph)
    free_biases(graph)
    canonicalize(graph)
    if quantization is not None:
        quantize_linears(graph, quantization)
        place_quantization(graph)
    if quantization is not None or found:
        check_quantized(graph)
    own_outputs(graph)


@dataclass(frozen=True)
class Rewritten:
    """Stored with a rewritten graph: its text before the passes, and the options they used."""

    text: str
    options: dict[str, Any]


def rewrite_once(captured: Captured, options: Options, target: str) -> str:
    """Rewrite a captured graph unless that is done; return its text from before the passes.

    Raises InputError if it was rewritten with other options.
    """
    graph, meta = captured.graph_module.graph, captured.graph_module.meta
    names = ("attention", "quantize", *(("keep_float",) if options.quantize != "none" else ()))
    pairs = meta.setdefault("pairs", has_pairs(graph)) and target == "cpu"
    wanted = {name: getattr(options, name) for name in names} | {"int8_pairs": pairs}
    check_target(options.quantize, given := meta.get("quantized", {}), target)
    if "rewritten" not in meta:
        text, how = str(graph), Quantization.of(options, meta.get("paths", {}), given)
        rewrite(graph, options.attention, how, pairs)
        meta["rewritten"] = Rewritten(text, wanted)
    done: Rewritten = meta["rewritten"]
    for name, value in wanted.items():
        if done.options.get(name) != value:
            raise InputError(
                f"{captured.name} was compiled with {name}={done.options.get(name)!r}: capture the "
                f"call again for {value!r}"
            )
    return done.text


def pack_once(captured: Captured, padding: str) -> Captured:
    """Return a capture over packed tokens if `padding` is "packed"; the graph is packed only once.

    Raises PackError if it cannot be packed, InputError if it was packed and `padding` is not.
    """
    meta = captured.graph_module.meta
    if padding == "packed" and "packed" not in meta:
        meta["packed"] = pack(captured)
        check_packed(captured.graph, TOKENS)
    if "packed" in meta and padding != "packed":
        raise InputError(
            f"{captured.name} was compiled with padding='packed', and its graph is rewritten for "
            f"that: capture the call again for {padding!r}"
        )
    found: Captured = meta.get("packed", captured)
    return found


def is_quantized(captured: Captured, options: Options) -> bool:
    """Return whether some products are of integers: by an option, or since weights are integers."""
    return options.quantize != "none" or bool(captured.graph_module.meta.get("quantized"))


def quantize_rows_once(captured: Captured, options: Options, target: str) -> Captured:
    """Return a copy of a capture in which kernels quantise the rows that int8 products read, on a
    GPU. The original graph stays as CPUs need it.

    Raises OptionsError for options under which a library would compute these products.
    """
    if target == "cpu" or not is_quantized(captured, options):
        return captured
    wrong = {"backend": "aten", "gemms": "cublas", "norms": "fold"}
    for name, value in wrong.items():
        if getattr(options, name) == value:
            asked = f"quantize={options.quantize!r}" * (options.quantize != "none")
            raise OptionsError(
                f"{asked or 'a model of quantised weights'} on {target} runs generated products, "
                f"whose rows the kernels of norms quantise, and {name}={value!r} forbids that: "
                "leave one out"
            )
    made = fx.GraphModule(captured.graph_module, copy.deepcopy(captured.graph))
    made.meta = dict(captured.graph_module.meta)
    quantize_all_rows(made.graph)
    check_quantized(made.graph)
    return replace(captured, graph_module=made)


def assemble_call(captured: Captured, options: Options, target: str) -> AssembledCall:
    """Return a captured call as launches, for CPUs or for GPUs; independent of the GPU model."""
    roles = GemmRoles.of(options, target, is_quantized(captured, options))
    text = rewrite_once(captured, options, target)
    captured = quantize_rows_once(pack_once(captured, options.padding), options, target)
    graph, dims = captured.graph, captured.dims
    check_rewritten(captured)
    hoisted = find_hoisted(graph)
    fused = log_fused(fuse_all(graph, check_regions(partition(graph, hoisted)), hoisted))
    kinds = {n: kind_of(n, hoisted) for n in graph.nodes}
    epilogues = find_epilogues(fused, kinds) if roles.epilogues else {}
    folds = find_folds(fused, kinds, epilogues) if roles.norms else {}
    given = (graph, fused, hoisted, dims, epilogues)
    programs = [Assembled(assemble(*given), fused, epilogues)]
    programs += [assemble_folded(*given, folds)] if folds else []
    programs += assemble_with_peaks(*given, kinds) if roles.rows else []
    on_gpu, by_pytorch = target != "cpu", options.backend == "aten"
    for program in programs:
        if roles.fallbacks:
            add_gemm_fallbacks(program)
        if not by_pytorch:
            fuse_stores(program.assembly)
        if on_gpu and not by_pytorch:
            add_split_workspaces(program.assembly)
        if on_gpu or by_pytorch:
            use_contiguous(program.assembly)
    check_programs([p.assembly for p in programs])
    return AssembledCall(captured, text, hoisted, tuple(programs), on_gpu)


def check_rewritten(captured: Captured) -> None:
    """Raise a TurbotxError if a graph violates the invariants that the passes establish."""
    require_known_sizes(captured.graph, captured.dims, captured.name)
    verify.check_graph(captured.graph)
    verify.check_inputs(captured.graph, captured.input_sizes)


def check_regions(regions: list[Region]) -> list[Region]:
    """Return the regions; raise VerifyError if one is invalid."""
    for region in regions:
        verify.check_region(region.nodes, region.outputs)
    return regions


def log_fused(fused: Sequence[FusedRegion]) -> Sequence[FusedRegion]:
    """Return the regions; log what each became."""
    if log.isEnabledFor(logging.INFO):
        for f in fused:
            why = "; ".join(f.reasons + f.choices)
            kernels = f"{len(f.kernels)} kernel{'s' if len(f.kernels) != 1 else ''}"
            log.info("%s: %d ops in %s%s", f.name, len(f.region.nodes), kernels, why and f": {why}")
    return fused


def check_programs(assemblies: Sequence[Assembly]) -> None:
    """Raise VerifyError if a launch, or a kernel that it may run, is invalid."""
    kernels: dict[str, ir.Kernel] = {}
    for launch in chain.from_iterable(a.launches for a in assemblies):
        fallback = launch.fallback if isinstance(launch, ir.GemmLaunch) else None
        for taken in (launch, *(fallback.ends if fallback is not None else ())):
            if isinstance(taken, ir.KernelLaunch):
                kernels.setdefault(taken.kernel.digest(), taken.kernel)
    for kernel in kernels.values():
        verify.check_kernel(kernel)
    for assembly in assemblies:
        verify.check_launches(assembly.tensors, assembly.launches, assembly.returned)


# --- to a program ---


def schedule(call: AssembledCall, options: Options, target: str, gpu: str = "") -> UnboundProgram:
    """Return the program of an assembled call for a target under options.

    Raises InputError if the call was assembled for CPUs and the target is a GPU, or vice versa.
    """
    if call.for_gpus == (target == "cpu"):
        raise InputError(
            f"the launches of {call.captured.name} are {'GPUs' if call.for_gpus else 'CPUs'}', and "
            f"{target!r} is none: compile the call for it"
        )
    make = _specialize_for_gpu if call.for_gpus else _specialize_for_cpu
    return UnboundProgram(call, options, target, tuple(make(call, options, target, gpu)))


def _specialize_for_cpu(
    call: AssembledCall, options: Options, target: str, gpu: str
) -> list[Specialization]:
    (program,) = call.programs
    code = build_for_cpu(program.assembly, call.captured.dims, options)
    return [Specialization(program, code)]


def _specialize_for_gpu(
    call: AssembledCall, options: Options, target: str, gpu: str
) -> list[Specialization]:
    tiles, dims = make_tiles(options, target, gpu), call.captured.dims
    # Library GEMMs cannot fold norms.
    programs = call.programs[:1] if options.gemms == "cublas" else call.programs
    ranges = choose_ranges([p.assembly for p in programs], dims, tiles)
    example = call.captured.example_dims
    made = []
    for program, served in zip(programs, ranges, strict=True):
        if served is None or served.buckets:
            given, on_device = program.assembly, options.backend != "aten"
            steps = find_steps(given, dims, example) if on_device else None
            kernels = LaunchKernels(given, dims, tiles, options, served, steps)
            made.append(Specialization(program, kernels))
    return made


# --- to what runs ---


def bind(
    program: UnboundProgram, model: nn.Module, pool: ChunkPool, device: Device | None = None
) -> Compiled:
    """Bind a program to the parameters of `model`, the memory of `pool` and a device (None for the
    CPU). GPU kernels are loaded by `build_ahead` or when a shape needs them."""
    options, captured = program.options, program.call.captured
    packing = captured.packing if isinstance(captured, PackedCapture) else None
    most = options.max_graphs if options.cuda_graphs else 0
    graphs = None if program.target == "cpu" else GraphCache(most)  # one limit for all programs
    programs: list[Program] = []
    for made in program.specializations:
        weights = find_weights(captured, model, made.assembled.assembly)
        runtime: CpuRuntime | CudaRuntime
        if isinstance(made.code, CpuCode):
            runtime = CpuRuntime(made.code, weights, options.keep_weights)
        else:
            assert device is not None
            runtime = CudaRuntime(made.code, weights, device)
        kept = (pool, options.max_shapes, packing, graphs)
        programs.append(make_program(made.executable, runtime, *kept))
    return Compiled(program, tuple(programs))


def build_ahead(compiled: Compiled) -> Compiled:
    """On a GPU, build the kernels of the expected shapes for all programs together. Returns
    `compiled`."""
    runtimes = [p.runtime for p in compiled.programs if isinstance(p.runtime, CudaRuntime)]
    if runtimes:
        build_expected(runtimes, compiled.captured.example_dims)
    return compiled


def find_weights(captured: Captured, model: nn.Module, assembly: Assembly) -> Weights:
    """Return a program's weights: the places of its parameters in the user's module, so that
    updates are seen; lifted constants; and the calls that compute hoisted constants."""
    nodes = {n.name: n for n in captured.graph_module.graph.nodes if n.op == "get_attr"}
    paths = captured.graph_module.meta["paths"]
    targets = {name: paths[node.target] for name, node in nodes.items()}
    lifted = (
        captured.graph_module.get_submodule("constants")
        if any(t.startswith("constants.") for t in targets.values())
        else nn.Module()
    )
    kinds = {name: Kind.of(node.meta["val"]) for name, node in nodes.items()}
    # Not named_buffers(): it omits the second name of a shared tensor.
    held = {**lifted._buffers, **lifted._parameters}
    constants = {name: tensor for name, tensor in held.items() if tensor is not None}
    copies: dict[str, Place] = {}
    for name, node in nodes.items():
        owner, _, leaf = str(node.target).rpartition(".")
        table = captured.graph_module.get_submodule(owner)._parameters
        if leaf in table:
            copies[name] = table, leaf
    return Weights(model, constants, targets, assembly.hoisted, kinds, copies)
