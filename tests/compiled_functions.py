"""Functions as their fused kernels, and ways to run them: by the interpreter or as compiled C++.

In: a function of tensors and example arguments. Out: a `Compilation`, whose regions can be looked
at and whose outputs can be computed with any runner of single kernels, for example::

    c = compile_function(lambda x: x.softmax(-1).sum(0), x)
    c.run((x,), by_interpreter)          # float64
    c.run((x,), CppRunner([c]))          # the printed C++, many kernels in one build
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from tests.kernel_interpreter import CheckFailed, interpret
from turbotx import ir
from turbotx.capture.callables import FunctionModule
from turbotx.capture.result_layouts import ORDER
from turbotx.capture.trace import Captured, capture
from turbotx.engine.pipeline import rewrite
from turbotx.ir.memory_order import in_memory
from turbotx.kernels.build import build_library
from turbotx.kernels.cpp.printer import print_kernel
from turbotx.kernels.fusion.fuse import FusedRegion, fuse_all
from turbotx.kernels.lowering.lower import Lowered
from turbotx.passes.partition import find_hoisted, partition
from turbotx.runtime.cpu.launch_table import PRELUDE

aten = torch.ops.aten
# Stored tensors are dense, whatever strides eager would have given them.
COPYING_VIEWS = {aten.view.default, aten._unsafe_view.default}
Runner = Callable[[ir.Kernel, dict[str, torch.Tensor], dict[str, int]], dict[str, torch.Tensor]]


@dataclass
class Compilation:
    captured: Captured
    graph: fx.Graph
    fused: list[FusedRegion]

    @property
    def kernels(self) -> list[ir.Kernel]:
        return [lowered.kernel for f in self.fused for lowered in f.kernels]

    @property
    def reasons(self) -> list[str]:
        return [reason for f in self.fused for reason in f.reasons]

    @property
    def externs(self) -> list[str]:
        """The calls that no kernel computes, those of parameters alone and views aside."""
        from turbotx.passes.partition import kind_of

        inside = {n for f in self.fused for n in f.region.nodes} | find_hoisted(self.graph)
        return [str(n.target) for n in self.graph.nodes
                if n not in inside and kind_of(n) in ("extern", "computed")]  # fmt: skip

    def run(self, tensors: Sequence[torch.Tensor], runner: Runner) -> list[Any]:
        """Return the flat outputs; ops outside kernels run through ATen."""
        return _Run(self, tensors, runner).outputs()


def compile_function(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Compilation:
    captured = capture(FunctionModule(function), args, kwargs)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if captured.matcher.match([x.shape for x in tensors]) is None:  # as the engine does
        small = {(i, d) for i, x in enumerate(tensors) for d, n in enumerate(x.shape) if n < 2}
        captured = capture(FunctionModule(function), args, kwargs, fixed=small)
    graph = captured.graph_module.graph
    rewrite(graph)
    hoisted = find_hoisted(graph)
    return Compilation(captured, graph, fuse_all(graph, partition(graph, hoisted), hoisted))


class _Run:
    def __init__(self, made: Compilation, tensors: Sequence[torch.Tensor], runner: Runner) -> None:
        self.made, self.runner = made, runner
        inputs = made.graph.find_nodes(op="placeholder")
        # The graph takes inputs by the order of their dims in memory, as `Program` gives them.
        self.env: dict[fx.Node, Any] = {
            node: in_memory(t, node.meta.get(ORDER))
            for node, t in zip(inputs, tensors, strict=True)
        }
        matcher = made.captured.matcher
        shapes = [t.shape for t in tensors]
        found = matcher.match(shapes)
        assert found is not None, matcher.explain(shapes)
        self.dims = dict(zip(made.captured.dims, found, strict=True))
        self.makers: dict[fx.Node, Lowered] = {
            node: lowered
            for f in made.fused
            for lowered in f.kernels
            for node, p in zip(lowered.operands, lowered.kernel.params, strict=True)
            if p.role == "out"
        }

    def outputs(self) -> list[Any]:
        (result,) = self.made.graph.find_nodes(op="output")
        return [self.value(n) if isinstance(n, fx.Node) else n for n in result.args[0]]

    def value(self, node: fx.Node) -> Any:
        if node not in self.env:
            lowered = self.makers.get(node)
            if lowered is not None:
                self._launch(lowered)
            elif node.op == "get_attr":
                owner, _, leaf = str(node.target).rpartition(".")
                module = self.made.captured.graph_module.get_submodule(owner)
                self.env[node] = getattr(module, leaf)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
                target = aten.reshape.default if node.target in COPYING_VIEWS else node.target
                self.env[node] = target(*args, **kwargs)  # type: ignore[operator]
        return self.env[node]

    def _launch(self, lowered: Lowered) -> None:
        params = lowered.kernel.params
        given = {
            p.name: self._operand(n)
            for n, p in zip(lowered.operands, params, strict=True)
            if p.role == "in"
        }
        made = self.runner(lowered.kernel, given, self.dims)
        for node, p in zip(lowered.operands, params, strict=True):
            if p.role == "out":
                self.env[node] = made[p.name]

    def _operand(self, node: fx.Node) -> torch.Tensor:
        value = self.value(node)
        return value if node.op == "get_attr" else value.contiguous()


def by_interpreter(
    kernel: ir.Kernel, given: dict[str, torch.Tensor], dims: dict[str, int]
) -> dict[str, torch.Tensor]:
    return interpret(kernel, given, dims)


class CppRunner:
    """The kernels of many compilations as printed C++, in one build; equal kernels are one."""

    def __init__(self, compilations: Iterable[Compilation], per_unit: int = 40) -> None:
        self.names: dict[str, str] = {}
        printed: list[str] = []
        for made in compilations:
            for kernel in made.kernels:
                if kernel.digest() not in self.names:
                    name = f"kernel_{len(printed)}"
                    self.names[kernel.digest()] = name
                    printed.append(print_kernel(kernel, name))
        units = {
            f"unit{k}": PRELUDE + "\n".join(printed[k : k + per_unit])
            for k in range(0, len(printed), per_unit)
        }
        self.library = build_library(units)[0] if units else None

    def __call__(
        self, kernel: ir.Kernel, given: dict[str, torch.Tensor], dims: dict[str, int]
    ) -> dict[str, torch.Tensor]:
        from turbotx.ir.expr import evaluate

        made: dict[str, torch.Tensor] = {}
        pointers = []
        for p in kernel.params:
            if p.role == "out":
                made[p.name] = torch.empty([evaluate(e, dims) for e in p.shape], dtype=p.dtype)
            pointers.append((given | made)[p.name].data_ptr())
        args = (ctypes.c_void_p * len(pointers))(*pointers)
        sizes = (ctypes.c_int64 * max(1, len(kernel.sizes)))(*(dims[n] for n in kernel.sizes))
        assert self.library is not None
        if getattr(self.library, self.names[kernel.digest()])(args, sizes):
            raise CheckFailed(kernel.name)
        return made
