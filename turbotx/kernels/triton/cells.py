"""Cells: sizes and addresses that a kernel reads from device memory, so that one graph serves many.

In: a job with `cells`, names of arguments. Out: the same kernel, in which these arguments are
addresses of 64-bit cells::

    k_len = tl.load(k_len)                                    # of a decoder's cache, at this step
    k_ptr = tl.load(k_ptr).to(tl.pointer_type(tl.float16))    # where its keys lie

They are read before the kernel waits for its predecessor: a program's cells are written before its
first launch.
"""

from __future__ import annotations

from dataclasses import replace

from turbotx.kernels.job import Job
from turbotx.kernels.triton.compiler import POINTEES
from turbotx.kernels.triton.reduce import TYPES

_TYPE_OF = {f"*{name}": TYPES[dtype] for dtype, name in POINTEES.items() if dtype in TYPES}


def read_cells(job: Job) -> Job:
    """Return the job of a kernel that reads its cells by address."""
    if not job.cells:
        return job
    head, body = job.split()
    lines, signature = ["    # Of this call, on the device.\n"], []
    for name, kind in job.signature:
        if name not in job.cells:
            signature.append((name, kind))
        elif kind.startswith("*"):
            signature.append((name, "*i64"))
            lines.append(f"    {name} = tl.load({name}).to(tl.pointer_type({_TYPE_OF[kind]}))\n")
            if name in job.divisible:
                lines.append(f"    {name} = tl.multiple_of({name}, 16)\n")
        else:
            signature.append((name, f"*{kind}"))
            lines.append(f"    {name} = tl.load({name})\n")
    source = head + "".join(lines) + body
    divisible = tuple(n for n in job.divisible if n not in job.cells)
    return replace(
        job, source=source, signature=tuple(signature), divisible=divisible, cells=()
    )  # fmt: skip
