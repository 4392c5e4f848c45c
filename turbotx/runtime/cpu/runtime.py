"""The CPU runtime: a program's kernels, built, and what runs them as `CpuExecutor` does.

In: an assembly, then the program's weights. Out: its code; something that runs it over an address
table::

    code = build_cpp(assembly, "auto")          # a library, kept on disk by digest
    failed = runtime.run(table, sizes, state)   # 0, or which launch failed and why
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from turbotx import ir
from turbotx.errors import BuildWarning, NoCompilerError
from turbotx.kernels.build import build_library
from turbotx.kernels.fusion.epilogue import GemmKernel
from turbotx.program.assemble import Assembly
from turbotx.runtime.aten import AtenSteps
from turbotx.runtime.cpu.launch_table import LaunchTable, load_runtime, packed_name, print_units
from turbotx.runtime.cpu.segments import CpuExecutor, Packing
from turbotx.runtime.weights import Weights

NATIVE_KINDS = frozenset({"kernel", "gemm", "attention", "product"})
WEIGHTS = ("parameter", "prepared")


@dataclass(frozen=True)
class CpuCode:
    """A program's kernels in C++, built; all of it empty where PyTorch's ops run in their place.

    runtime: turbotx's own library. kernels: the program's, None where it has no kernels.
    sources: the C++ by translation unit. names: the function of every kernel by `kernel_key`.
    builds: how many shared objects had to be compiled.
    """

    runtime: ctypes.CDLL | None = None
    kernels: ctypes.CDLL | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[object, str] = field(default_factory=dict)
    builds: int = 0


def build_cpp(assembly: Assembly, backend: str) -> CpuCode:
    """Build the kernels of an assembly's launches for this CPU, as the option `backend` asks.

    Raises NoCompilerError where it asks for C++ and there is no compiler, BuildError with the
    compiler's words.
    """
    if backend == "aten":
        return CpuCode()
    try:
        runtime, built = load_runtime()
        sources, names = print_units(assembly)
        if not sources:
            return CpuCode(runtime, None, sources, names, int(built))
        kernels, more = build_library(sources)
        return CpuCode(runtime, kernels, sources, names, built + more)
    except NoCompilerError as error:
        if backend == "cpp":
            raise
        warnings.warn(
            f"{error}; until then regions run through ATen, in planned memory, slower",
            BuildWarning,
            stacklevel=3,
        )
        return CpuCode()


class CpuRuntime(CpuExecutor):
    """Executes a program's launches. builds, sources: those of its `CpuCode`."""

    def __init__(
        self, assembly: Assembly, weights: Weights, code: CpuCode, dims: Sequence[str],
        packs_weights: bool = True,
    ) -> None:  # fmt: skip
        self.builds, self.sources = code.builds, code.sources
        native = code.runtime
        kinds: frozenset[str] = NATIVE_KINDS if native is not None else frozenset()
        if not packs_weights:
            kinds -= {"gemm"}
        launches = assembly.launches
        self.table = LaunchTable(assembly, kinds, native, code.kernels, dict(code.names))
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
