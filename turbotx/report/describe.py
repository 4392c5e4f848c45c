"""Describe: a compiled call's stages as report entries, with numbers evaluated at one shape.

In: a `Compiled` and the values of its dims. Out: lists of `entries` records, for example::

    describe_regions(view)  ->  [Region(name="fused_add_gelu_0", nodes=("add_732", "gelu"), ...)]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from turbotx import ir
from turbotx.engine.compiled import Compiled
from turbotx.ir import fx_nodes as g
from turbotx.ir.attention_ops import NO_WINDOW
from turbotx.ir.expr import Expr, evaluate
from turbotx.ir.matmul_kernels import AttentionKernel, ProductKernel
from turbotx.ir.printer import SHORT, show_expr, show_kernel
from turbotx.ir.quantized_ops import QUANTIZES
from turbotx.kernels.job import Job
from turbotx.kernels.triton.attention import print_triton_attention
from turbotx.kernels.triton.printer import print_triton
from turbotx.kernels.triton.products import print_triton_product
from turbotx.passes.partition import GEMMS, kind_of, op_name
from turbotx.program.folded_weights import fold_weight
from turbotx.report import entries
from turbotx.report.apart import why_apart
from turbotx.report.cost import Cost, launch_cost
from turbotx.runtime.cpu.launch_table import UNITS, Generated, kernel_key, print_units
from turbotx.runtime.cpu.runtime import CpuCode

BY_TEMPLATE = (ir.GemmLaunch, ir.GroupedGemmLaunch, ir.RouteLaunch, ir.SequenceLaunch)
"""Launches that run a kernel template on a GPU."""


@dataclass(frozen=True)
class View:
    """A compiled call at one shape."""

    compiled: Compiled
    dims: Mapping[str, int]

    def number(self, formula: Expr) -> int:
        """Return the value of a size expression at the report's shape."""
        return evaluate(formula, self.dims)

    @property
    def launches(self) -> list[ir.Launch]:
        """The program's launches in execution order."""
        return self.compiled.assembly.launches

    @cached_property
    def functions(self) -> dict[object, str]:
        """The name of every generated function, by its key."""
        return print_units(self.compiled.assembly)[1]

    def function_of(self, launch: ir.Launch) -> str:
        """Return the name of the generated function of a launch, "" for an op of PyTorch."""
        key = kernel_key(launch)
        return "" if key is None else self.functions[key]

    @cached_property
    def templates(self) -> dict[str, Job]:
        """On a GPU, the kernels generated from templates at these dims, which CPUs do not have: of
        GEMMs and of sequence ops."""
        code = self.compiled.specialization.code
        if isinstance(code, CpuCode):
            return {}
        found = code.at(list(self.dims.values()))
        return {x.launch.name: x.job for x in found if isinstance(x.launch, BY_TEMPLATE)}

    def kernel_of(self, launch: ir.Launch) -> str:
        """Return the generated kernel that a launch runs at these dims, "" if there is none."""
        job = self.templates.get(launch.name)
        return job.name if job is not None else self.function_of(launch)

    def kind_of(self, launch: ir.Launch) -> str:
        """Return the kind of a launch; "kernel" also for those that only CPUs leave to PyTorch."""
        generated = isinstance(launch, ir.SequenceLaunch) and launch.name in self.templates
        return "kernel" if generated else launch.kind

    def through(self, gemm: ir.Launch) -> str:
        """Return what runs a GEMM launch, as text."""
        if isinstance(self.compiled.specialization.code, CpuCode):
            return "packed weight"
        return self.kernel_of(gemm) or "the library"

    def cost_of(self, launch: ir.Launch) -> entries.TrafficEntry:
        """Return a launch's bytes and operations at the report's shape, and as formulas."""
        cost: Cost = launch_cost(launch)
        reads, writes = self.number(cost.reads), self.number(cost.writes)
        return entries.TrafficEntry(
            reads, writes, reads + writes, show_expr(cost.reads), show_expr(cost.writes),
            self.number(cost.flops), show_expr(cost.flops),
        )  # fmt: skip


def describe_cache(view: View) -> entries.CacheEntry | None:
    """Return the size of the call's cache; None for a call without one."""
    captured = view.compiled.captured
    sizes = dict(zip(captured.input_names, captured.input_sizes, strict=True))
    if "kv_memory" not in sizes:
        return None
    dtype = view.compiled.program.executable.inputs[captured.input_names.index("kv_memory")].dtype
    elements, batch, capacity = map(view.number, sizes["kv_memory"])
    token, length = elements * dtype.itemsize, view.number(sizes["kv_length"][0])
    return entries.CacheEntry(token, token * batch * length, token * batch * capacity)


def describe_launches(
    view: View, regions: Sequence[entries.RegionEntry]
) -> list[entries.LaunchEntry]:
    """Return a record per launch, in execution order."""
    apart = {name: r.apart for r in regions for name in r.launches}
    return [
        entries.LaunchEntry(
            x.name, view.kind_of(x), view.kernel_of(x), x.module, x.source, x.reads, x.writes,
            view.cost_of(x), apart.get(x.name, ""),
        )
        for x in view.launches
    ]  # fmt: skip


def describe_kernels(view: View) -> list[entries.KernelEntry]:
    """Return one entry per generated function, in order of first use."""
    users: dict[str, list[ir.Launch]] = {}
    for launch in view.launches:
        name = view.kernel_of(launch)
        if name:
            users.setdefault(name, []).append(launch)
    return [_kernel(view, name, launches) for name, launches in users.items()]


def _kernel(view: View, name: str, launches: list[ir.Launch]) -> entries.KernelEntry:
    first = launches[0]
    cost = view.cost_of(launches[0])
    header = f"// {name}: {launches[0].source}\n// runs as {_listed([x.name for x in launches])}\n"
    if isinstance(first, BY_TEMPLATE):
        job = view.templates[first.name]
        text, sources = show_template(job), {"triton": job.source}
    else:
        assert isinstance(first, Generated)
        unit, (show, print_for_gpu) = UNITS[type(first)], _SHOWN[type(first)]
        text = show(first.kernel)
        sources = {
            "cpp": header + unit.prelude + unit.print(first.kernel, name),
            "triton": print_for_gpu(first.kernel, name=name),
        }
    return entries.KernelEntry(
        name, view.kind_of(first), text, sources, tuple(x.name for x in launches),
        cost.read_nbytes, cost.written_nbytes, cost.compulsory_nbytes, cost.read_formula,
        cost.written_formula, cost.flops,
    )  # fmt: skip


def show_template(job: Job) -> str:
    """Return a GEMM template's build parameters as text."""
    tiles = ", ".join(f"{name}={value}" for name, value in job.constexprs)
    return f"{job.name}: {tiles}, {job.num_warps} warps, {job.num_stages} stages"


def show_attention(kernel: AttentionKernel) -> str:
    """Return an attention launch's compile-time properties as text."""
    masks = [] if kernel.keys == "all" else ["key mask" if kernel.keys == "mask" else "lengths"]
    masks += [f"{kernel.bias} bias"] if kernel.bias != "none" else []
    masks += ["by sequence"] if kernel.packed else []
    masks += ["queries at the last keys"] if kernel.late else []
    masks += ["causal"] if kernel.causal else []
    masks += [f"window {kernel.window}"] if kernel.window != NO_WINDOW else []
    kind = SHORT[kernel.dtype]
    return (
        f"{kernel.name}(q: in {kind}, k: in {kind}, v: in {kind}, out: out {kind})\n"
        f"  for batch, head, query row; head_dim {kernel.head_dim}, one pass over the keys\n"
        f"    out = softmax({'; '.join([f'{kernel.scale!r} * q k^T', *masks])}) v"
    )


def show_product(kernel: ProductKernel) -> str:
    """Return one of attention's products as text."""
    kind = SHORT[kernel.dtype]
    scores = kernel.which == "scores"
    args = f"q: in {kind}, k: in {kind}, scores: out {SHORT[torch.float32]}"
    if not scores:
        args = f"shares: in {kind}, v: in {kind}, out: out {kind}"
    return (
        f"{kernel.name}({args})\n  for batch, head, query row; head_dim {kernel.head_dim}\n"
        f"    {'scores = q k^T' if scores else 'out = shares v'}"
    )


_SHOWN: dict[type[ir.Launch], tuple[Callable[[Any], str], Callable[..., str]]] = {
    ir.KernelLaunch: (show_kernel, print_triton),
    ir.AttentionLaunch: (show_attention, print_triton_attention),
    ir.ProductLaunch: (show_product, print_triton_product),
}
"""How the kernel of each generated type of launch is shown as text, and printed in Triton."""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def describe_regions(view: View) -> list[entries.RegionEntry]:
    """Return one entry per region, named like its submodule in the fused graph."""
    by_nodes = {x.nodes: x for x in view.launches if isinstance(x, ir.KernelLaunch)}
    gemms = {name: x for x in view.launches if x.kind == "gemm" for name in x.writes}
    kinds = {n: kind_of(n, view.compiled.hoisted) for n in view.compiled.graph.nodes}
    names: Counter[str] = Counter()
    found = []
    for fused in view.compiled.fused:
        name = f"{fused.name}_{names[fused.name]}"
        names[fused.name] += 1
        launches = [by_nodes[k.operands] for k in fused.kernels if k.operands in by_nodes]
        nodes = fused.region.nodes
        joined = [gemms[n.name] for n in fused.region.outputs if n.name in gemms]
        reasons = [f"computed by the epilogue of {x.name}" for x in joined]
        reasons = reasons or fused.reasons + fused.choices
        found.append(
            entries.RegionEntry(
                name, tuple(n.name for n in nodes), tuple(map(op_name, nodes)),
                tuple(map(view.function_of, launches)), tuple(x.name for x in launches or joined),
                "; ".join(reasons), _distinct(map(g.module_of, nodes)),
                _distinct(map(g.place_of, nodes)), tuple(x.name for x in joined),
                why_apart(view.compiled, fused, kinds) if launches else "",
            )
        )  # fmt: skip
    return found


def _distinct(values: Any) -> tuple[str, ...]:
    return tuple(v for v in dict.fromkeys(values) if v)


def describe_gemms(view: View) -> list[entries.Gemm]:
    """Return an entry for every matrix product: those with packed weights, and those run by
    PyTorch."""
    parameters = {n.name: str(n.target) for n in view.compiled.graph.nodes if n.op == "get_attr"}
    hoisted = view.compiled.assembly.hoisted
    found = []
    for x in view.launches:
        if isinstance(x, (ir.GemmLaunch, ir.GroupedGemmLaunch)):
            weight = x.weight.tensor
            made = weight in hoisted
            names = tuple(parameters_of(hoisted[weight]) if made else [parameters[weight]])
            m, n, k = x.rows, x.weight.shape[-2], x.x.shape[-1]
            sizes = (view.number(m), view.number(k), view.number(n), show_expr(m))
            packed = len(names) > 1
            found.append(entries.Gemm(x.name, x.module, *sizes, names, packed, view.through(x)))
        elif isinstance(x, ir.AtenLaunch) and x.call.target in GEMMS:
            found.append(_aten_gemm(view, x))
    return found


def _aten_gemm(view: View, x: ir.AtenLaunch) -> entries.Gemm:
    operands = [a for a in x.operands if a is not None]
    inputs = [a for a in operands if a.tensor not in x.writes]
    shape, depth = operands[-1].shape, inputs[0].shape[-1]
    m = operands[-1].shape[:-1]
    rows = math.prod(map(view.number, m))
    return entries.Gemm(
        x.name, x.module, rows, view.number(depth), view.number(shape[-1]),
        "*".join(show_expr(e) for e in m), (), False, str(x.call.target),
    )  # fmt: skip


def parameters_of(weight: fx.Node) -> list[str]:
    """Return the paths of the parameters from which a weight is computed, in order, without those
    of a norm folded into it."""
    if weight.op == "get_attr":
        return [str(weight.target)]
    sources = weight.all_input_nodes[: 1 if weight.target in (fold_weight, *QUANTIZES) else None]
    return [path for source in sources for path in parameters_of(source)]


def describe_externs(view: View) -> list[entries.Extern]:
    """Return the ops that PyTorch runs, with counts and reasons."""
    generated = {
        str(x.call.target) for x in view.launches
        if isinstance(x, ir.SequenceLaunch) and x.name in view.templates
    }  # fmt: skip
    counted = Counter(x for x in view.compiled.assembly.externs if x[0] not in generated)
    return [entries.Extern(op, count, reason) for (op, reason), count in counted.items()]
