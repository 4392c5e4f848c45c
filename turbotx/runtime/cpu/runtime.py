"""The CPU runtime: a program's kernels, built, and what runs them as `CpuExecutor` does.

In: an assembly; then the program's weights. Out: its executable and libraries, kept on disk by
digest; something that runs it over an address table::

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
"""The launches that C++ runs, where there is a compiler."""


@dataclass(frozen=True)
class CpuCode:
    """A program for this CPU, bound to no parameters.

    libraries: "runtime", turbotx's own, and "kernels", the program's, built; without those that do
    not exist, in whose place PyTorch's ops run. sources: the C++ by translation unit. builds: how
    many shared objects had to be compiled.
    """

    executable: Executable
    libraries: Mapping[str, ctypes.CDLL]
    sources: Mapping[str, str]
    builds: int


def build_for_cpu(assembly: Assembly, dims: Sequence[str], options: Options) -> CpuCode:
    """Build the kernels of an assembly's launches, as the option `backend` asks, and link it.

    Raises NoCompilerError where it asks for C++ and there is no compiler, BuildError with the
    compiler's words.
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
    """Executes a program's launches. sources, builds: those of its `CpuCode`."""

    def __init__(self, code: CpuCode, weights: Weights, keep_weights: bool = True) -> None:
        super().__init__(code.executable, weights, code.libraries, keep_weights)
        self.sources, self.builds = code.sources, code.builds

    @property
    def is_native(self) -> bool:
        """Whether generated kernels run, not PyTorch's ops in their place."""
        return self._native is not None
