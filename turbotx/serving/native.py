"""The planners' inner loops in C++, built once with the machine's compiler.

In: a name. Out: a function that fills the dynamic program's table in tens of microseconds, or None
if no compiler is found (the same loop then runs in Python, 50 times slower)::

    fill = load_planner("fill")      # built into ~/.cache/turbotx, loaded with ctypes
"""

from __future__ import annotations

import contextlib
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

from turbotx.errors import NoCompilerError
from turbotx.kernels.build import cache_directory, find_compiler

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

// The same for batches without padding: tokens[j], squares[j] are sums over the first j requests,
// cost[t] is what t tokens take; a batch of two or more has at most `budget` of them.
extern "C" void fill_tokens(int64_t n, int64_t max_batch, int64_t budget, double square_ms,
                            const int64_t *tokens, const double *squares, const double *cost,
                            const double *price, double *best, int64_t *size) {
    best[0] = 0.0;
    for (int64_t j = 1; j <= n; ++j) {
        double least = std::numeric_limits<double>::infinity();
        int64_t members = 1;
        const int64_t most = j < max_batch ? j : max_batch;
        for (int64_t b = 1; b <= most; ++b) {
            const int64_t i = j - b, total = tokens[j] - tokens[i];
            if (b > 1 && total > budget) break;
            const double took = cost[total] + square_ms * (squares[j] - squares[i]);
            const double sum = best[i] + price[i] * took;
            if (sum < least) { least = sum; members = b; }
        }
        best[j] = least;
        size[j] = members;
    }
}
"""

log = logging.getLogger(__name__)


INTEGER, REAL, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
SIGNATURES = {
    "fill": [INTEGER] * 3 + [POINTER] * 5,
    "fill_tokens": [INTEGER] * 3 + [REAL] + [POINTER] * 6,
}


@functools.cache
def load_planner(name: str) -> Any | None:
    """Return a compiled loop of ``SIGNATURES`` as a ctypes function, or None."""
    library = _load_library()
    if library is None:
        return None
    found = getattr(library, name)
    found.argtypes, found.restype = SIGNATURES[name], None
    return found


@functools.cache
def _load_library() -> ctypes.CDLL | None:
    """Return the compiled loops, or None, which is logged once."""
    try:
        return _build(find_compiler())
    except (NoCompilerError, OSError, subprocess.SubprocessError) as error:
        log.warning("batches are planned in Python, about 50 times slower: %s", error)
        return None


def _build(compiler: str) -> ctypes.CDLL:
    digest = hashlib.sha256(f"{compiler}\n{SOURCE}".encode()).hexdigest()[:16]
    kept = cache_directory() / f"batch_plan_{digest}.so"
    if os.path.exists(kept):
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as scratch:
        source, built = Path(scratch) / "plan.cpp", Path(scratch) / "plan.so"
        source.write_text(SOURCE)
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(built), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        library = ctypes.CDLL(str(built))
        with contextlib.suppress(OSError):  # cache not writable: built again at each start
            _keep(built, kept)
    return library


def _keep(built: Path, kept: Path) -> None:
    """Copy a file atomically: processes may build concurrently, the last complete copy wins."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as beside:
        os.replace(shutil.copy(built, beside), kept)
