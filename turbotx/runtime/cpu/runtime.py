"""The CPU runtime: builds a program's kernels, and runs them as `CpuExecutor` does.

In: an assembly and the program's weights. Out: something that runs it over an address table::

    failed = runtime.run(table, sizes, state)   # 0, or which launch failed and why
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterable, Sequence

from turbotx import ir
from turbotx.errors import BuildWarning, NoCompilerError
from turbotx.kernels.build import build_library
from turbotx.kernels.fusion.epilogue import GemmKernel
from turbotx.options import Options
from turbotx.program.assemble import Assembly
from turbotx.runtime.aten import AtenSteps
from turbotx.runtime.cpu.launch_table import LaunchTable, load_runtime, packed_name, print_units
from turbotx.runtime.cpu.segments import CpuExecutor, Packing
from turbotx.runtime.weights import Weights

NATIVE_KINDS = frozenset({"kernel", "gemm", "attention", "product", "store"})
WEIGHTS = ("parameter", "prepared")


class CpuRuntime(CpuExecutor):
    """Builds a program's kernels and executes its launches.

    builds: how many shared objects had to be compiled. sources: the C++ by translation unit.
    """

    share = None  # it serves every call

    def __init__(
        self, assembly: Assembly, weights: Weights, options: Options, dims: Sequence[str]
    ) -> None:
        self.builds = 0
        self.sources: dict[str, str] = {}
        self.names: dict[object, str] = {}
        native, kernels = self._build(assembly, options)
        kinds: frozenset[str] = NATIVE_KINDS if native is not None else frozenset()
        if not options.pack_weights:
            kinds -= {"gemm"}
        launches = assembly.launches
        self.table = LaunchTable(assembly, kinds, native, kernels, self.names)
        slots = self.table.slots
        steps = AtenSteps(dims)
        packed = _packed_weights(x for x in launches if x.kind in kinds)
        super().__init__(
            weights, native, self.table.records, self.table.segments,
            steps={i: steps.make(x) for i, x in enumerate(launches) if x.kind not in kinds},
            weight_slots={n: slots[n] for n, t in assembly.tensors.items() if t.kind in WEIGHTS},
            packings=[Packing(slots[n], w, (gated,)) for n, (w, gated) in packed.items()],
            slot_count=len(slots),
        )  # fmt: skip

    def _build(
        self, assembly: Assembly, options: Options
    ) -> tuple[ctypes.CDLL | None, ctypes.CDLL | None]:
        """Return the C++ runtime and the program's kernels; None for what is not to be had."""
        if options.backend == "aten":
            return None, None
        try:
            native, built = load_runtime()
            self.builds += built
            self.sources, self.names = print_units(assembly)
            if not self.sources:
                return native, None
            kernels, built = build_library(self.sources)
            self.builds += built
            return native, kernels
        except NoCompilerError as error:
            if options.backend == "cpp":
                raise
            warnings.warn(
                f"{error}; until then regions run through ATen, in planned memory, slower",
                BuildWarning,
                stacklevel=3,
            )
            return None, None

    @property
    def is_native(self) -> bool:
        """Whether generated kernels run, not PyTorch's ops in their place."""
        return self._native is not None


def _packed_weights(launches: Iterable[ir.Launch]) -> dict[str, tuple[ir.Operand, bool]]:
    """Return what every packed weight is made of and whether it is gated, by its name."""
    return {
        packed_name(x): (x.args[1], x.target.gated)
        for x in launches
        if isinstance(x.target, GemmKernel) and x.args[1] is not None
    }
