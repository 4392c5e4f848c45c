"""Compiles a small source against turbotx/kernels/cpp as generated code is, and loads it.

In: C++ text and a folder; out: a ctypes library, which asks torch's OpenMP library how many threads
to use, because it is linked without one. Example: ``build(source, tmp_path).my_function(...)``.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from turbotx.kernels.build import HEADERS, compiler_flags

COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = [*compiler_flags(), "-Wall", "-Wextra", "-Werror"]
NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def build(source: str, folder: Path, *more: str) -> ctypes.CDLL:
    """Compile, with `more` flags, and load; raises CalledProcessError, with the compiler's text on
    stderr."""
    (folder / "probe.cpp").write_text(source)
    compiler = str(COMPILER)
    subprocess.run(
        [compiler, *FLAGS, *more, f"-I{HEADERS}", "-c", "probe.cpp", "-o", "probe.o"],
        cwd=folder,
        check=True,
    )
    subprocess.run([compiler, "-shared", "probe.o", "-o", "probe.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "probe.so"))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
