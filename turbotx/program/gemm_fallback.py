"""GEMM fallback: alternative launches of a GEMM with an epilogue, for a GPU to choose from.

In: an assembly with GEMM launches. Out: each with a workspace for split sums and, if it has an
epilogue, a `fallback`: a bare GEMM followed by the region's kernels. Folded norms and int8 factors
get none: no library computes them. For a BERT layer's first::

    linear_gelu_0 (gemm)  ->  fallback: linear (gemm) into out, fused_add_gelu over it in place

The list of launches is the same for every shape; the runtime chooses when it binds one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sympy import Integer

from turbotx import ir
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import product
from turbotx.ir.matmul_kernels import GemmKernel
from turbotx.kernels.fusion.epilogue import Epilogue
from turbotx.kernels.fusion.fuse import FusedRegion
from turbotx.kernels.fusion.inplace import find_inplace
from turbotx.kernels.gemm_heuristics import SPLIT_SUMS_NBYTES
from turbotx.program.assembly import Assembled, Assembly, dense, whole


def add_gemm_fallbacks(assembled: Assembled) -> None:
    """Add workspaces and fallbacks to the GEMM launches of an assembly."""
    assembly = assembled.assembly
    ends = {e.output.name: e for e in assembled.epilogues.values()}
    regions = {f.region.outputs[-1].name: f for f in assembled.fused}
    for i, launch in enumerate(assembly.launches):
        if not isinstance(launch, ir.GemmLaunch):
            continue
        name = f"{launch.name}_split_sums"
        shape = (Integer(SPLIT_SUMS_NBYTES // 4),)
        assembly.tensors[name] = ir.Tensor(name, "intermediate", torch.float32, shape)
        launch = replace(launch, workspaces=(name,))
        written = launch.writes[0]
        if written in ends and launch.int8 is None and not launch.gemm.folds:
            launch = _Parts(assembly, launch, ends[written], regions[written]).run()
        assembly.launches[i] = launch


class _Parts:
    def __init__(
        self, assembly: Assembly, launch: ir.GemmLaunch, end: Epilogue, fused: FusedRegion
    ) -> None:
        self.assembly, self.launch, self.end, self.fused = assembly, launch, end, fused
        self.workspaces = list(launch.workspaces)

    def run(self) -> ir.GemmLaunch:
        sums = self._sums()
        fallback = ir.GemmFallback(self._gemm(sums), tuple(self._kernels(sums)))
        # The bare GEMM writes to the result's memory, so a residual must not share it.
        return replace(
            self.launch, workspaces=tuple(self.workspaces), fallback=fallback, inplace=()
        )

    def _sums(self) -> ir.Operand:
        """Return where the bare GEMM writes: the result's memory if a kernel can update it in
        place."""
        linear, output = self.end.linear, self.end.output
        shape, dtype = g.shape(linear), g.dtype(linear)
        if len(self.fused.kernels) == 1 and product(shape) == product(g.shape(output)):
            (lowered,) = self.fused.kernels
            named = zip(lowered.operands, lowered.kernel.params, strict=True)
            param = {node: p.name for node, p in named}
            if (param[output], param[linear]) in find_inplace(lowered.kernel):
                return dense(replace(self.assembly.tensors[output.name], shape=shape))
        return dense(self._workspace(ir.Tensor(linear.name, "intermediate", dtype, shape)))

    def _workspace(self, tensor: ir.Tensor) -> ir.Tensor:
        self.assembly.tensors[tensor.name] = tensor
        self.workspaces.append(tensor.name)
        return tensor

    def _gemm(self, sums: ir.Operand) -> ir.GemmLaunch:
        given, linear = self.launch, self.end.linear
        target: Any = linear.target
        own = given.bias if len(linear.args) > 2 else None  # otherwise the kernel adds it
        call = ir.AtenCall(target, (given.x, given.weight, own), {}, (sums,), has_out=True)
        return ir.GemmLaunch(
            GemmKernel(), given.x, given.weight, own, sums, None, given.rows, given.x_stride, call,
            name=f"{given.name}.linear", source=linear.name, module=given.module,
        )  # fmt: skip

    def _kernels(self, sums: ir.Operand) -> list[ir.KernelLaunch]:
        found = []
        for lowered in self.fused.kernels:
            kernel, args = lowered.kernel, []
            for node in lowered.operands:
                tensor = self.assembly.tensors.get(node.name)
                if node is self.end.linear:
                    args.append(sums)
                    continue
                if tensor is None:  # between two kernels of the region
                    made = ir.Tensor(node.name, "intermediate", g.dtype(node), g.shape(node))
                    tensor = self._workspace(made)
                args.append(whole(node, tensor))
            name = f"{self.launch.name}.{kernel.name}"
            found.append(
                ir.KernelLaunch(
                    kernel, tuple(args), lowered.operands, name=name, module=self.launch.module
                )
            )
            self.assembly.requirements += lowered.requirements
        return found
