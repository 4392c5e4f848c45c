"""Apart: why a kernel between GEMMs is a separate launch and not a GEMM's epilogue.

In: a compiled call and one of its regions. Out: the reason as text::

    why_apart(compiled, region)  ->  "layer_norm needs whole rows, and a GEMM's launch ..."
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from turbotx.engine.compiled import Compiled
from turbotx.ir import fx_nodes as g
from turbotx.ir.quantized_ops import quantize_rows
from turbotx.kernels.fusion.epilogue import match_epilogue, packable_inputs
from turbotx.kernels.fusion.fuse import FusedRegion
from turbotx.passes.partition import BEGINS, GEMMS, op_name, root_of

FINISHING = frozenset({"add", "mul", "relu", "gelu", "silu", "sigmoid", "tanh", "pow", "to_copy"})
"""Ops that epilogues consist of."""
NORMS = frozenset({"layer_norm", "rms_norm"})
"""Ops that a GPU's GEMMs can apply to their input."""


def why_apart(compiled: Compiled, fused: FusedRegion, kinds: Mapping[fx.Node, str]) -> str:
    """Return why no GEMM's launch computes a region that has its own kernels.

    kinds: the kind of each node of the graph, by `kind_of`.
    """
    region, options = fused.region, compiled.unbound.options
    if BEGINS in region.nodes[0].meta:
        return (
            "it quantises rows that a GEMM's launch finishes: never more bytes than one kernel for "
            "both"
        )
    read = [n for n in map(root_of, region.inputs) if n.target in GEMMS]
    if not read:
        return "it reads no matrix product that it could finish"
    if not options.epilogues:
        return "epilogues=False was asked for"
    if not options.pack_weights and compiled.unbound.target == "cpu":
        return "pack_weights=False was asked for, and PyTorch runs the matrix products"
    if any(g.is_call(n, quantize_rows) for n in region.nodes):
        many = "" if not _has_other_program(compiled) else (
            "; at this many tokens that is faster than products that quantise what they read"
        )  # fmt: skip
        return (
            "it quantises rows for an int8 product, which needs whole rows, and a GEMM's launch "
            f"stores its sums tile by tile{many}"
        )
    norms = [op_name(n) for n in region.nodes if op_name(n) in NORMS]
    if norms and compiled.unbound.target != "cpu":
        return _why_stored(compiled, norms[0])
    packable = packable_inputs(fused, compiled.fused, kinds)
    if not packable:
        return (
            f"{read[-1].name} has no packed weight and PyTorch runs it, or its sums are read by "
            "another kernel too"
        )
    if len(region.outputs) > 1:
        return f"{len(region.outputs)} results leave it, and a GEMM's launch stores one"
    if norms:
        return (
            f"{norms[0]} needs whole rows, and a GEMM's launch on a CPU finishes its sums one by "
            "one, tile by tile"
        )
    if any(match_epilogue(region, linear, kinds) for linear in packable):
        return "the matrix product that it would finish finishes another run already"
    return _first_unlike(region.nodes, packable[0])


def _first_unlike(nodes: tuple[fx.Node, ...], linear: fx.Node) -> str:
    for node in nodes:
        if op_name(node) not in FINISHING:
            return f"{op_name(node)} is nothing that a GEMM's launch does to its sums"
    return (
        "it is no chain of bias, activation, gate and residual over all of the sums of "
        f"{linear.name}"
    )


def _why_stored(compiled: Compiled, norm: str) -> str:
    """Return why a norm is a separate kernel on a GPU, where GEMMs can normalise their input."""
    options = compiled.unbound.options
    if options.norms == "store" or options.gemms == "cublas":
        asked = "norms='store'" if options.norms == "store" else "gemms='cublas'"
        return f"{asked} was asked for"
    if options.quantize == "none" and _has_other_program(compiled):
        return f"at this many tokens a kernel for {norm} is expected to be faster than folding it"
    return (
        f"not only GEMMs of known weights read {norm}, and they alone can normalise by themselves"
    )


def _has_other_program(compiled: Compiled) -> bool:
    """Return whether for fewer tokens there is a program with fewer launches."""
    programs = compiled.unbound.call.programs
    return len(programs) > 1 and compiled.specialization.assembled is programs[0]
