"""The CPU runtime: builds a program's kernels, and runs them as a `CpuExecutor`.

In: an assembly; then the program's weights. Out: its executable and libraries, cached on disk by
digest; an object that runs it over an address table::

    code = build_for_cpu(assembly, ("batch", "seq"), options)
    failed = runtime.run(table, sizes, state)   # 0, or which launch failed and why
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turbotx import ir
from turbotx.errors import BuildWarning, NoCompilerError
from turbotx.kernels.build import build_library
from turbotx.options import Options
from turbotx.program.assembly import Assembly
from turbotx.program.cache_stores import use_contiguous
from turbotx.program.executable import Executable
from turbotx.program.link import link
from turbotx.runtime.cpu.executor import CpuExecutor
from turbotx.runtime.cpu.launch_table import lay_out_launches, load_runtime, print_units
from turbotx.runtime.weights import Weights

NATIVE = frozenset(
    (
        ir.KernelLaunch,
        ir.GemmLaunch,
        ir.GroupedGemmLaunch,
        ir.RouteLaunch,
        ir.AttentionLaunch,
        ir.ProductLaunch,
        ir.StoreLaunch,
    )
)
"""The launches that C++ runs if there is a compiler."""


@dataclass(frozen=True)
class CpuCode:
    """A program for this CPU, not bound to parameters.

    libraries: "runtime" (turbotx's own) and "kernels" (the program's), as far as they exist;
    PyTorch's ops replace missing ones.
    sources: the C++ by translation unit.
    builds: number of shared objects that had to be compiled.
    """

    executable: Executable
    libraries: Mapping[str, ctypes.CDLL]
    sources: Mapping[str, str]
    builds: int


def build_for_cpu(assembly: Assembly, dims: Sequence[str], options: Options) -> CpuCode:
    """Build the kernels of an assembly, as the option `backend` says, and link it.

    Raises NoCompilerError if the option requires C++ and there is no compiler, BuildError with the
    compiler's output.
    """
    sources, names = ({}, {}) if options.backend == "aten" else print_units(assembly)
    libraries, built = _build(sources, options.backend)
    types = NATIVE if "runtime" in libraries else frozenset()
    if not options.pack_weights:
        types -= {ir.GemmLaunch, ir.GroupedGemmLaunch}
    if ir.AttentionLaunch not in types:
        use_contiguous(assembly)
    layout = lay_out_launches(assembly, types, names)
    executable = link(assembly, dims, options.planner, layout)
    return CpuCode(executable, libraries, sources if libraries else {}, built)


def _build(sources: Mapping[str, str], backend: str) -> tuple[dict[str, ctypes.CDLL], int]:
    """Return the libraries, and how many had to be compiled."""
    if backend == "aten":
        return {}, 0
    try:
        native, built = load_runtime()
        if not sources:
            return {"runtime": native}, int(built)
        kernels, too = build_library(sources)
        return {"runtime": native, "kernels": kernels}, built + too
    except NoCompilerError as error:
        if backend == "cpp":
            raise
        warnings.warn(
            f"{error}; until then regions run through ATen, in planned memory, slower",
            BuildWarning,
            stacklevel=3,
        )
        return {}, 0


class CpuRuntime(CpuExecutor):
    """Runs a program's launches. sources, builds: of its `CpuCode`."""

    def __init__(self, code: CpuCode, weights: Weights, keep_weights: bool = True) -> None:
        super().__init__(code.executable, weights, code.libraries, keep_weights)
        self.sources, self.builds = code.sources, code.builds

    @property
    def is_native(self) -> bool:
        """Whether generated kernels run instead of PyTorch's ops."""
        return self._native is not None
