"""OpenMP: the one library of threads of the process, PyTorch's own, also around a fork.

In: nothing; what is loaded is read from the process. Out: its path, its symbols for the kernels
that are loaded later, and a thread that may fork, for example::

    find_openmp()  ->  ".../torch/lib/libgomp.so.1"
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

_SOFT = 1
"""`omp_pause_soft`: what the library holds of the thread's settings stays."""


def find_openmp() -> str | None:
    """Return the path of the OpenMP library that this process has loaded, None where none is seen
    (not on Linux, or before PyTorch was imported)."""
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
    """End the OpenMP threads that wait for work of the calling thread; its next parallel loop
    starts others. Called before each fork.

    GCC's library, which PyTorch's wheels for Linux bring, keeps these threads in a list, and a
    forked child has the list without the threads: its first parallel loop, PyTorch's or a kernel's,
    waited for them forever. LLVM's library sees to that itself.
    """
    file = find_openmp()
    if file is not None and Path(file).name.startswith("libgomp"):
        pause = getattr(ctypes.CDLL(file), "omp_pause_resource_all", None)  # since GCC 9
        if pause is not None:
            pause(_SOFT)
