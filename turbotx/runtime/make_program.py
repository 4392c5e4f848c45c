"""Make program: an executable and what runs it, as the class of program for its device and padding.

In: an executable, the queue or executor of its launches, and memory. Out: a program, which takes a
call's tensors; models just compiled and models from files are both run by it::

    make_program(executable, executor, pool, 256).run(binding, [ids, mask])
"""

from __future__ import annotations

from typing import Any

from turbotx.memory.pool import ChunkPool
from turbotx.passes.packing import TokenPacking
from turbotx.program.executable import Executable
from turbotx.runtime.cuda.cuda_graphs import CudaGraphProgram, GraphCache
from turbotx.runtime.cuda.packed_graphs import PackedGraphProgram
from turbotx.runtime.packed_program import PackedProgram
from turbotx.runtime.program import Program


def make_program(
    executable: Executable, runtime: Any, pool: ChunkPool, max_shapes: int,
    packing: TokenPacking | None = None, graphs: GraphCache | None = None,
) -> Program:  # fmt: skip
    """Return the program of an executable.

    runtime: runs its launches on a CPU, or queues them on a GPU. max_shapes: how many shapes keep a
    plan. packing: set if it runs over tokens. graphs: on a GPU, the CUDA graphs of all programs of
    its call; None on a CPU.
    """
    kept = (executable, runtime, pool, max_shapes)
    if graphs is None:
        return Program(*kept) if packing is None else PackedProgram(*kept, packing)
    if packing is None:
        return CudaGraphProgram(*kept, graphs)
    return PackedGraphProgram(*kept, graphs, packing)
