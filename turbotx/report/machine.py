"""Machine: what this machine can run, what is missing, and how to get it.

In: nothing. Out: a `Diagnosis` per component, each actually tested: the compiler compiles, the
cache stores a file. Printed by `turbotx doctor` and kept in reports::

    Diagnosis("compiler", "ok", "/usr/bin/g++")
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from turbotx.errors import TurbotxError, first_line, versions
from turbotx.kernels.build import build_library, cache_directory, find_compiler
from turbotx.kernels.openmp import share_openmp
from turbotx.kernels.processor import processor_flags, processor_name
from turbotx.runtime.cuda.device import CudaDevice

VECTORS = ("avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "avx2", "fma", "f16c", "asimd", "sve")


@dataclass(frozen=True)
class Diagnosis:
    """The state of a component: "ok", "missing" (turbotx works without it, in a reduced way) or
    "broken"."""

    name: str
    state: str
    found: str
    remedy: str = ""


def _python() -> Diagnosis:
    place = f"{platform.python_version()}, {platform.system()} on {platform.machine()}"
    if platform.system() == "Linux":
        return Diagnosis("python", "ok", place)
    return Diagnosis("python", "missing", place, "turbotx is made for Linux and tested there only")


def _torch() -> Diagnosis:
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    installed = versions().get("turbotx", "from source")
    found = f"torch {torch.__version__}, turbotx {installed}, {threads}"
    mkl = torch.backends.mkl.is_available()
    remedy = "" if mkl else "PyTorch has no MKL here: turbotx's own GEMM runs for float32"
    return Diagnosis("torch", "ok", found, remedy)


def _triton() -> Diagnosis:
    if importlib.util.find_spec("triton") is None:
        return Diagnosis(
            "triton", "missing", "not installed", "pip install triton: --target needs it"
        )
    return Diagnosis("triton", "ok", str(importlib.import_module("triton").__version__))


def _compiler() -> Diagnosis:
    try:
        return Diagnosis("compiler", "ok", find_compiler())
    except TurbotxError as error:
        return Diagnosis("compiler", "missing", "regions run through PyTorch's ops", str(error))


def _build() -> Diagnosis:
    """Compile, load and call a unique function, so that no cached object can answer."""
    token = int.from_bytes(os.urandom(6), "big")
    source = f'#include "storage.h"\nextern "C" long long ttx_doctor() {{ return {token}LL; }}\n'
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            patch.dict(os.environ, TURBOTX_CACHE_DIR=folder),
        ):
            library, _ = build_library({"doctor": source})
        library.ttx_doctor.restype = ctypes.c_longlong
        state = "ok" if library.ttx_doctor() == token else "broken"
        return Diagnosis("build", state, "a C++ function compiles, loads and runs")
    except TurbotxError as error:
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            return Diagnosis("build", "missing", "no compiler to try")
        return Diagnosis("build", "broken", first_line(error), "see the compiler's message")


def _openmp() -> Diagnosis:
    library = share_openmp()
    if library is None:
        return Diagnosis(
            "openmp", "missing", "PyTorch's was not found", "kernels run in one thread"
        )
    return Diagnosis("openmp", "ok", f"{Path(library).name} tells how many threads to use")


def _vectors() -> Diagnosis:
    flags = processor_flags()
    if not flags:  # unknown on this system
        return Diagnosis("processor", "ok", processor_name())
    units = [v for v in VECTORS if v in flags]
    found = f"{processor_name()}: {', '.join(units) or 'no vector units'}"
    if {"avx512f", "avx2", "asimd"} & flags:
        return Diagnosis("processor", "ok", found)
    return Diagnosis("processor", "missing", found, "kernels are slow without vector units")


def _gpu() -> Diagnosis:
    if not torch.cuda.is_available():
        return Diagnosis("gpu", "missing", "none that PyTorch sees; kernels can be built for one")
    try:
        device = CudaDevice(torch.device("cuda"))
    except TurbotxError as error:
        return Diagnosis("gpu", "missing", torch.cuda.get_device_name(), str(error))
    found = f"{device.describe()}, kernels for {device.target}"
    if importlib.util.find_spec("cuda") is None:
        return Diagnosis("gpu", "ok", found, "pip install cuda-bindings: arenas then never move")
    return Diagnosis("gpu", "ok", found)


def _cache() -> Diagnosis:
    folder = cache_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
        nbytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    except OSError as error:
        remedy = "set TURBOTX_CACHE_DIR to a folder that can be written"
        return Diagnosis("cache", "broken", f"{folder}: {error.strerror}", remedy)
    free = shutil.disk_usage(folder).free
    return Diagnosis(
        "cache", "ok", f"{folder}: {nbytes / 2**20:.1f} MiB, {free / 2**30:.1f} GiB free"
    )


EXTRAS = {
    "weights": ("safetensors",),
    "hf": ("transformers", "safetensors", "tokenizers"),
    "serve": ("starlette", "uvicorn", "msgspec", "prometheus_client"),
    "bench": ("onnxruntime", "ortools", "matplotlib"),
    "notebook": ("jupytext", "nbclient"),
}


def _extra(name: str, modules: tuple[str, ...]) -> Diagnosis:
    absent = [m for m in modules if importlib.util.find_spec(m) is None]
    if not absent:
        return Diagnosis(f"extra {name}", "ok", ", ".join(modules))
    remedy = f"pip install 'turbotx[{name}]'"
    return Diagnosis(f"extra {name}", "missing", f"without {', '.join(absent)}", remedy)


CHECKS: dict[str, Callable[[], Diagnosis]] = {
    "python": _python, "torch": _torch, "triton": _triton, "compiler": _compiler,
    "build": _build, "openmp": _openmp, "processor": _vectors, "gpu": _gpu, "cache": _cache,
}  # fmt: skip
"""By name, in display order."""


def check_extras() -> list[Diagnosis]:
    """Return which of the package's extras are installed."""
    return [_extra(name, modules) for name, modules in EXTRAS.items()]
