"""Programmatic dependent launch: a kernel that may start while the one before it ends.

In: a job for a GPU of compute capability 9.0 or newer. Out: the same kernel, which first waits for
the grid before it, and then lets the one behind it come to wait in turn::

    make_dependent(job).source    # ..., gdc_wait(), gdc_launch_dependents(), the kernel's own lines

A kernel that has something to do meanwhile marks where it begins to read (`MARK`); its job says
what to do (`Job.before_wait`). Waiting and launching do nothing in an ordinary launch.
"""

from __future__ import annotations

import re
from dataclasses import replace

from turbotx.kernels.job import Job
from turbotx.kernels.triton.compiler import target_of

# Above, a kernel computes where it works, and reads nothing.
MARK = "# From here on it reads what other kernels have written."
IMPORT = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n"
# The wait ends when the whole grid before has ended and its stores are seen. The other call comes
# after it, so that no more than two kernels of a chain are ever under way.
WAIT = """    # Wait for what the kernel before writes, and to write what it reads.
    gdc_wait()
    gdc_launch_dependents()
"""


def can_depend(target: str) -> bool:
    """Return whether a target has grid dependency control."""
    backend, architecture, _ = target_of(target)
    return backend == "cuda" and int(architecture) >= 90


def make_dependent(job: Job) -> Job:
    """Return the job of a kernel that waits for its predecessor by itself."""
    begin = re.search(rf"^def {re.escape(job.name)}\([^)]*\):\n", job.source, re.MULTILINE)
    assert begin is not None, job.source
    head, body = job.source[: begin.end()], job.source[begin.end() :]
    language = "import triton.language as tl\n"
    head = head.replace(language, language + IMPORT)
    first, mark, rest = body.partition(f"    {MARK}\n")
    body = first + job.before_wait + WAIT + rest if mark else WAIT + body
    return replace(job, source=head + body, before_wait="", pdl=True)
