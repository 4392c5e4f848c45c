"""The CPU runtime: builds a program's kernels, and runs them as `CpuExecutor` does.

In: an assembly and the program's weights. Out: its executable, and something that runs it over an
address table::

    failed = runtime.run(table, sizes, state)   # 0, or which launch failed and why
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence

from turbotx import ir
from turbotx.errors import BuildWarning, NoCompilerError
from turbotx.kernels.build import build_library
from turbotx.options import Options
from turbotx.program.assembly import Assembly
from turbotx.program.link import link
from turbotx.runtime.cpu.executor import CpuExecutor
from turbotx.runtime.cpu.launch_table import lay_out_launches, load_runtime, print_units
from turbotx.runtime.weights import Weights

NATIVE = frozenset((ir.KernelLaunch, ir.GemmLaunch, ir.AttentionLaunch, ir.ProductLaunch))
"""The launches that C++ runs, where there is a compiler."""


class CpuRuntime(CpuExecutor):
    """Builds a program's kernels and executes its launches.

    sources: the C++ by translation unit.
    """

    def __init__(
        self, assembly: Assembly, weights: Weights, options: Options, dims: Sequence[str]
    ) -> None:
        self.sources: dict[str, str] = {}
        self._names: dict[object, str] = {}
        libraries, built = self._build(assembly, options)
        types = NATIVE if "runtime" in libraries else frozenset()
        if not options.pack_weights:
            types -= {ir.GemmLaunch}
        layout = lay_out_launches(assembly, types, self._names)
        self.executable = link(assembly, dims, options.planner, layout)
        super().__init__(self.executable, weights, libraries)
        self.builds = built

    def _build(self, assembly: Assembly, options: Options) -> tuple[dict[str, ctypes.CDLL], int]:
        """Return the C++ runtime and the program's kernels, without what is not to be had, and how
        many had to be compiled."""
        if options.backend == "aten":
            return {}, 0
        try:
            native, built = load_runtime()
            self.sources, self._names = print_units(assembly)
            if not self.sources:
                return {"runtime": native}, int(built)
            kernels, too = build_library(self.sources)
            return {"runtime": native, "kernels": kernels}, built + too
        except NoCompilerError as error:
            if options.backend == "cpp":
                raise
            warnings.warn(
                f"{error}; until then regions run through ATen, in planned memory, slower",
                BuildWarning,
                stacklevel=3,
            )
            return {}, 0

    @property
    def is_native(self) -> bool:
        """Whether generated kernels run, not PyTorch's ops in their place."""
        return self._native is not None
