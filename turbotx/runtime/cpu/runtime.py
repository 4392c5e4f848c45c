"""The CPU runtime: builds a program's kernels, and runs them as a `CpuExecutor`.

In: an assembly; then the program's weights. Out: its executable and libraries, cached on disk by
digest; an object that runs it over an address table::

    code = build_for_cpu(assembly, ("batch", "seq"), options)
    failed = runtime.run(table, sizes, state)   # 0, or which launch failed and why
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterable, Mapping, Sequence
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
from turbotx.runtime.cpu.launch_table import (
    lay_out_launches,
    load_library,
    own_function,
    print_units,
    start_libraries,
)
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

    libraries: turbotx's own that it needs, by their names in `abi.SOURCES`, and "kernels", the
    program's; none without a compiler, where PyTorch's ops replace them.
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
    types = NATIVE
    if not options.pack_weights:
        types -= {ir.GemmLaunch, ir.GroupedGemmLaunch}
    own = [own_function(x) for x in assembly.launches if type(x) in types]
    needed = dict.fromkeys(("runtime", *(library for library, _ in filter(None, own))))
    libraries, built = _build(sources, needed, options.backend)
    if not libraries:
        types = frozenset()
    if ir.AttentionLaunch not in types:
        use_contiguous(assembly)
    layout = lay_out_launches(assembly, types, names)
    executable = link(assembly, dims, options.planner, layout)
    return CpuCode(executable, libraries, sources if libraries else {}, built)


def _build(
    sources: Mapping[str, str], needed: Iterable[str], backend: str
) -> tuple[dict[str, ctypes.CDLL], int]:
    """Return turbotx's libraries and the program's, and how many had to be compiled."""
    if backend == "aten":
        return {}, 0
    try:
        start_libraries(needed)
        found = {"kernels": build_library(sources)} if sources else {}
        found |= {name: load_library(name) for name in needed}
    except NoCompilerError as error:
        if backend == "cpp":
            raise
        warnings.warn(
            f"{error}; without one regions run through ATen, in planned memory, slower",
            BuildWarning,
            stacklevel=3,
        )
        return {}, 0
    return {name: library for name, (library, _) in found.items()}, sum(
        b for _, b in found.values()
    )


class CpuRuntime(CpuExecutor):
    """Runs a program's launches. sources, builds: of its `CpuCode`."""

    def __init__(self, code: CpuCode, weights: Weights, keep_weights: bool = True) -> None:
        super().__init__(code.executable, weights, code.libraries, keep_weights)
        self.sources, self.builds = code.sources, code.builds

    @property
    def is_native(self) -> bool:
        """Whether generated kernels run instead of PyTorch's ops."""
        return self._native is not None
