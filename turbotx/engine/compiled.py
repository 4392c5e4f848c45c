"""The compiled stages of one call: assembled, unbound and bound programs.

In: nothing; these are types. Out, for example::

    AssembledCall  --schedule-->  UnboundProgram  --bind-->  Compiled
    unbound.at((1, 40)).executable.token_range   # {16, 32, 64} tokens: norms are folded there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from turbotx.capture.trace import Captured
from turbotx.kernels.fusion.fuse import FusedRegion
from turbotx.options import Options
from turbotx.program.assembly import Assembled, Assembly
from turbotx.program.executable import Executable
from turbotx.runtime.cpu.runtime import CpuCode
from turbotx.runtime.cuda.runtime import LaunchKernels
from turbotx.runtime.program import Program


@dataclass(frozen=True)
class AssembledCall:
    """A captured call as launches over named tensors, for CPUs or for any GPU.

    text: the graph as captured.
    hoisted: the nodes that depend on parameters alone.
    programs: the launches; on a GPU a second entry may have norms folded into GEMMs.
    """

    captured: Captured
    text: str
    hoisted: frozenset[fx.Node]
    programs: tuple[Assembled, ...]
    for_gpus: bool


@dataclass(frozen=True)
class Specialization:
    """A program for a range of shapes, not bound to parameters or memory.

    code: its kernels; already built for a CPU.
    """

    assembled: Assembled
    code: CpuCode | LaunchKernels

    @property
    def executable(self) -> Executable:
        """The program as plain data; its `token_range` holds the shapes that it serves."""
        return self.code.executable

    def serves(self, dims: Sequence[int]) -> bool:
        """Return whether it serves calls with these dim values."""
        served = self.executable.token_range
        return served is None or served.holds(dims)


@dataclass(frozen=True)
class UnboundProgram:
    """A call compiled for one target and set of options, not bound to parameters, memory or a
    device.

    target: "cpu" or a GPU, such as "sm_90".
    specializations: each shape is served by one of them.
    """

    call: AssembledCall
    options: Options
    target: str
    specializations: tuple[Specialization, ...]

    def at(self, dims: Sequence[int]) -> Specialization:
        """Return the specialization that serves a shape."""
        return next(s for s in self.specializations if s.serves(dims))


@dataclass(frozen=True)
class Compiled:
    """A call bound to parameters, memory and a device, viewed as one of its specializations.

    programs: one per specialization.
    index: the specialization that the properties below refer to.
    """

    unbound: UnboundProgram
    programs: tuple[Program, ...]
    index: int = 0

    @property
    def captured(self) -> Captured:
        """The call as it was captured."""
        return self.unbound.call.captured

    @property
    def graph(self) -> fx.Graph:
        """The graph after the passes."""
        return self.captured.graph_module.graph

    @property
    def hoisted(self) -> frozenset[fx.Node]:
        """The nodes that depend on parameters alone: hoisted constants."""
        return self.unbound.call.hoisted

    @property
    def specialization(self) -> Specialization:
        """The specialization at `index`."""
        return self.unbound.specializations[self.index]

    @property
    def fused(self) -> Sequence[FusedRegion]:
        """The regions with their kernels."""
        return self.specialization.assembled.fused

    @property
    def assembly(self) -> Assembly:
        """Launches and tensors before linking."""
        return self.specialization.assembled.assembly

    @property
    def program(self) -> Program:
        """The bound program of this specialization."""
        return self.programs[self.index]

    @property
    def specializations(self) -> tuple[Compiled, ...]:
        """This call viewed as each of its specializations."""
        return tuple(replace(self, index=k) for k in range(len(self.programs)))

    def at(self, dims: Sequence[int]) -> Compiled:
        """Return the call viewed as the specialization that serves a shape. A packed program
        chooses later, once its number of tokens is known, which the dims of a padded call do not
        determine."""
        if len(self.programs) == 1 or len(dims) < len(self.captured.dims):
            return self
        dims = self.program.effective_dims(dims)
        served = (s.serves(dims) for s in self.unbound.specializations)
        return replace(self, index=list(served).index(True))
