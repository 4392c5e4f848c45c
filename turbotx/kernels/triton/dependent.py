"""Programmatic dependent launch: lets a kernel start before the previous one ends.

In: a job for a GPU of compute capability 9.0 or newer. Out: the same kernel, which first waits for
the previous grid and then allows the next one to start::

    make_dependent(job).source    # ..., gdc_wait(), gdc_launch_dependents(), the kernel's own lines

A kernel with work to do before the wait marks where it begins to read (`MARK`); its job has that
work (`Job.before_wait`). Both instructions do nothing in an ordinary launch.
"""

from __future__ import annotations

from dataclasses import replace

from turbotx.kernels.job import Job
from turbotx.kernels.triton.compiler import target_of

# Above this line a kernel computes its indices and reads no memory.
MARK = "# From here on it reads what other kernels have written."
IMPORT = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n"
# The wait returns when the previous grid has ended and its stores are visible. The launch comes
# after it, so that at most two kernels of a chain run at a time.
WAIT = """    # Wait for what the kernel before writes, and to write what it reads.
    gdc_wait()
    gdc_launch_dependents()
"""


def can_depend(target: str) -> bool:
    """Return whether a target supports grid dependency control."""
    backend, architecture, _ = target_of(target)
    return backend == "cuda" and int(architecture) >= 90


def make_dependent(job: Job) -> Job:
    """Return the job of a kernel that waits for its predecessor itself."""
    head, body = job.split()
    language = "import triton.language as tl\n"
    head = head.replace(language, language + IMPORT)
    first, mark, rest = body.partition(f"    {MARK}\n")
    body = first + job.before_wait + WAIT + rest if mark else WAIT + body
    return replace(job, source=head + body, before_wait="", pdl=True)
