"""A program on a GPU: launches one by one at a shape's first use, a replayed graph afterwards.

In: what `Program` takes, and where its graphs are kept. Out: a `Program` that runs as
`runtime.graphs` says::

    GraphedProgram(assembly, dims, runtime, pool, "symbolic", 256, graphs=Graphs(128))
"""

from __future__ import annotations

from typing import Any

from turbotx.ir.expr import compile_evaluator
from turbotx.runtime.cuda.cuda_graphs import CudaGraphCall, GraphCache, Inputs
from turbotx.runtime.cuda.runtime import CudaRuntime
from turbotx.runtime.program import Program


class CudaGraphProgram(CudaGraphCall, Program):
    """One captured call, compiled for one GPU; thread-safe as `Program` is."""

    runtime: CudaRuntime

    def __init__(self, *args: Any, graphs: GraphCache, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inputs = [self.assembly.tensors[name] for name, _ in self._places.inputs]
        extents = compile_evaluator([e for t in inputs for e in t.shape], self.dims)
        self.keep_graphs(graphs, Inputs(extents, [(len(t.shape), t.dtype) for t in inputs]))
