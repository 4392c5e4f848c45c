"""OpenMP: finds and shares PyTorch's OpenMP library, and prepares it for a fork.

In: nothing; the loaded libraries are read from the process. Out: its path; its symbols, visible to
kernels loaded later; a thread that can fork::

    find_openmp()  ->  ".../torch/lib/libgomp.so.1"
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

_SOFT = 1
"""`omp_pause_soft`: what the library holds of the thread's settings stays."""


def find_openmp() -> str | None:
    """Return the path of the loaded OpenMP library, None if not on Linux or PyTorch is not
    imported."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for line in maps.splitlines():
        file = line.rpartition(" ")[2]
        name = Path(file).name
        if name.startswith(("libgomp", "libiomp5", "libomp")) and ".so" in name:
            return file
    return None


@functools.cache
def share_openmp() -> str | None:
    """Make torch's OpenMP symbols visible to the libraries loaded after; return its path."""
    import torch

    torch.get_num_threads()  # loads the runtime
    file = find_openmp()
    if file is None:
        own = Path(torch.__file__).parent / "lib" / "libomp.dylib"
        file = str(own) if own.exists() else None
    if file is not None:
        ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
    return file


def end_threads() -> None:
    """End the calling thread's idle OpenMP threads; its next parallel loop starts new ones. Called
    before each fork.

    GCC's library (in PyTorch's Linux wheels) keeps these threads in a list, which a forked child
    inherits without the threads: its first parallel loop would wait for them forever. LLVM's
    library handles forks itself.
    """
    file = find_openmp()
    if file is not None and Path(file).name.startswith("libgomp"):
        pause = getattr(ctypes.CDLL(file), "omp_pause_resource_all", None)  # since GCC 9
        if pause is not None:
            pause(_SOFT)
