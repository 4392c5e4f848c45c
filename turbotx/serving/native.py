"""The planner's inner loop in C++, built once with the machine's compiler.

In: nothing. Out: a function that fills the dynamic program's table in tens of microseconds, or
None where no compiler is found (then ``plan`` runs the same loop in Python, 50 times slower)::

    fill = load_fill()      # built into ~/.cache/turbotx, loaded with ctypes
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCE = r"""
#include <cstdint>
#include <limits>

// best[j]: least price of the first j requests; size[j]: members of its last group.
extern "C" void fill(int64_t n, int64_t max_batch, int64_t stride, const int64_t *length,
                     const double *cost, const double *price, double *best, int64_t *size) {
    best[0] = 0.0;
    for (int64_t j = 1; j <= n; ++j) {
        const double *row = cost + length[j - 1] * stride;
        double least = std::numeric_limits<double>::infinity();
        int64_t members = 1;
        const int64_t most = j < max_batch ? j : max_batch;
        for (int64_t b = 1; b <= most; ++b) {
            const double total = best[j - b] + price[j - b] * row[b];
            if (total < least) { least = total; members = b; }
        }
        best[j] = least;
        size[j] = members;
    }
}
"""

log = logging.getLogger(__name__)


@functools.cache
def load_fill() -> Any | None:
    """Return the compiled loop as a ctypes function; None, logged once, if it cannot be
    compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        log.warning("no C++ compiler found: batches are planned in Python, about 50 times slower")
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the batch planner was not built (%s): planning in Python", error)
        return None
    fill = library.fill
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    fill.argtypes = [integer, integer, integer, pointer, pointer, pointer, pointer, pointer]
    fill.restype = None
    return fill


def _build(compiler: str) -> Path:
    digest = hashlib.sha256(f"{compiler}\n{SOURCE}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TURBOTX_CACHE_DIR", Path.home() / ".cache" / "turbotx"))
    target = folder / f"batch_plan_{digest}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, built = Path(scratch) / "plan.cpp", Path(scratch) / "plan.so"
        source.write_text(SOURCE)
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(built), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        os.replace(built, target)  # two processes may build at once: the last one wins, whole
    return target
