"""Meaning: the PyTorch call that is equivalent to a launch.

In: any launch. Out: its `AtenCall`. For a generated kernel, the ops of its region as a graph, made
on request; for all others the call stored in the launch::

    meaning_of(fused_add_gelu_0)  ->  AtenCall(GraphModule: add, gelu, (linear, bias), {}, (gelu,))
"""

from __future__ import annotations

from turbotx import ir
from turbotx.passes.extract import extract


def meaning_of(launch: ir.Launch) -> ir.AtenCall:
    """Return the PyTorch call with the same reads and writes as a launch."""
    if isinstance(launch, ir.KernelLaunch):
        return _meaning_of_kernel(launch)
    with_call = (
        ir.GemmLaunch, ir.GroupedGemmLaunch, ir.RouteLaunch, ir.AttentionLaunch, ir.ProductLaunch,
        ir.StoreLaunch, ir.AtenLaunch,
    )  # fmt: skip
    assert isinstance(launch, with_call), launch
    return launch.call


def _meaning_of_kernel(launch: ir.KernelLaunch) -> ir.AtenCall:
    rows = list(zip(launch.kernel.params, launch.nodes, launch.args, strict=True))
    inputs, outputs = ([n for p, n, _ in rows if p.role == role] for role in ("in", "out"))
    reads, writes = ([a for p, _, a in rows if p.role == role] for role in ("in", "out"))
    extracted = extract(outputs, inputs, launch.kernel.name)
    return ir.AtenCall(extracted.module, (*reads, *extracted.sizes), {}, tuple(writes))
