"""Record: what every stage made of one call, at one shape, as plain entries.

In: a compiled call, its origin and the sizes of its dims. Out: regions, kernels, launches, GEMMs,
PyTorch's ops, the memory plan; everything also as dicts for JSON::

    record.kernels[0].signature  ->  "fused_add_layer_norm_0(x[batch, seq, 384], ...)"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from torch import fx

from turbotx import ir
from turbotx.capture.equal_layers.layers import LayerCalls
from turbotx.engine.compiled import Compiled
from turbotx.engine.fused_graph import make_fused_graph
from turbotx.errors import InputError
from turbotx.report import entries
from turbotx.report.cost import eager_nbytes
from turbotx.report.describe import (
    View,
    describe_cache,
    describe_externs,
    describe_gemms,
    describe_kernels,
    describe_launches,
    describe_regions,
)
from turbotx.report.findings import Findings
from turbotx.report.held import describe_plan
from turbotx.report.origin import Node, Origin, simulate
from turbotx.report.provenance import Provenance, find_provenance

Self = TypeVar("Self", bound="Record")


@dataclass(frozen=True)
class Record:
    """One compiled call at one shape.

    dims: the value of every symbolic size.
    findings: measurements at this shape.
    """

    compiled: Compiled
    origin: Origin
    dims: dict[str, int]
    planner: str
    findings: Findings = field(default_factory=Findings)

    @property
    def name(self) -> str:
        """The model's class."""
        return self.compiled.captured.name

    @property
    def target(self) -> str:
        """The compilation target: "cpu" or a GPU, such as "sm_90"."""
        return self.compiled.unbound.target

    @property
    def layers(self) -> LayerCalls:
        """Which of the model's layers were traced, which copied from an equal one, and why others
        were not."""
        return self.compiled.captured.layers

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The fused graph: an ordinary torch.fx.GraphModule with a submodule per region."""
        return make_fused_graph(self.compiled)

    @cached_property
    def view(self) -> View:
        """The compiled program at the record's shape."""
        return View(self.compiled, self.dims)

    @cached_property
    def regions(self) -> list[entries.RegionEntry]:
        """The regions, with their kernels and the reasons for their ends."""
        return describe_regions(self.view)

    def equal_regions(self) -> dict[tuple[tuple[str, ...], ...], list[entries.RegionEntry]]:
        """Return the regions grouped by the key (ops, kernels, became), which those of equal layers
        share."""
        groups: dict[tuple[tuple[str, ...], ...], list[entries.RegionEntry]] = {}
        for region in self.regions:
            groups.setdefault((region.ops, region.kernels, region.became), []).append(region)
        return groups

    @cached_property
    def kernels(self) -> list[entries.KernelEntry]:
        """The generated functions, without duplicates."""
        return describe_kernels(self.view)

    @cached_property
    def launches(self) -> list[entries.LaunchEntry]:
        """The launches in execution order."""
        return describe_launches(self.view, self.regions)

    @cached_property
    def gemms(self) -> list[entries.Gemm]:
        """The matrix products."""
        return describe_gemms(self.view)

    @cached_property
    def externs(self) -> list[entries.Extern]:
        """The ops that PyTorch runs, and why."""
        return describe_externs(self.view)

    @cached_property
    def memory(self) -> entries.Memory:
        """The memory plan at this shape, with PyTorch's memory use for comparison."""
        held = simulate(self.origin, self.dims)
        return describe_plan(self.view, self.planner, held)

    @cached_property
    def cache(self) -> entries.CacheEntry | None:
        """The size of a decoder's key/value cache; None for a call without one."""
        return describe_cache(self.view)

    @cached_property
    def provenance(self) -> Provenance:
        """What made the report: command, date, device, dtype, versions, the machine's
        components."""
        return find_provenance(self.compiled)

    @cached_property
    def ops(self) -> list[Node]:
        """The captured model's ops with tensor results; sizes are omitted."""
        return [n for n in self.origin.nodes if n.kind == "call_function" and n.nbytes != 0]

    @cached_property
    def eager(self) -> entries.Eager:
        """The captured model as PyTorch runs it, for comparison."""
        moved = eager_nbytes(self.origin)
        return entries.Eager(len(moved), sum(self.view.number(n) for n in moved.values()))

    def at(self: Self, **dims: int) -> Self:
        """Return the report at another shape, e.g. at(batch=8, seq=128); nothing is compiled.

        A dim that is not named follows a named one that had the same size, and is otherwise
        unchanged. Raises InputError for an unknown dim or a size below 1.
        """
        findings = Findings(resources=self.findings.resources)  # the others are of one shape
        wanted = follow(self.dims, dims)
        compiled = self.compiled.at(tuple(wanted.values()))
        return replace(self, compiled=compiled, dims=wanted, findings=findings)

    def with_findings(self: Self, **found: Any) -> Self:
        """Return the report with more findings: results of `numerics` and `profile` under these
        names, and resources by kernel and target."""
        return replace(self, findings=replace(self.findings, **found))

    def function_of(self, launch: ir.Launch) -> str:
        """Return the name of the generated function of a launch, "" if there is none."""
        return self.view.function_of(launch)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists, strings and numbers, ready for JSON."""
        return {
            "model": self.name,
            "dims": dict(self.dims),
            "provenance": asdict(self.provenance),
            "regions": [asdict(r) for r in self.regions],
            "kernels": [asdict(k) for k in self.kernels],
            "launches": [asdict(x) for x in self.launches],
            "gemms": [asdict(x) for x in self.gemms],
            "externs": [asdict(x) for x in self.externs],
            "memory": {
                **asdict(self.memory),
                "arena_nbytes": self.memory.arena_nbytes,
                "total_nbytes": self.memory.total_nbytes,
            },
            "cache": None if self.cache is None else asdict(self.cache),
            "eager": asdict(self.eager),
            "resources": self.findings.resources_as_dicts(),
            "numerics": self.findings.numerics_as_dicts(),
            "times_us": self.findings.times_us(),
        }


def follow(dims: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    """Return `dims` with the given ones changed, and those changed along that had equal sizes.

    Raises InputError for an unknown dim or a size below 1.
    """
    unknown = sorted(set(given) - set(dims))
    if unknown:
        raise InputError(f"no dim is called {unknown[0]!r}; this model's are {', '.join(dims)}")
    for name, size in given.items():
        if size < 1:
            raise InputError(f"{name}={size}: a size must be at least 1")
    leaders = {dims[name]: size for name, size in reversed(list(given.items()))}
    return {
        name: given.get(name, leaders.get(size, size) if "_d" in name else size)
        for name, size in dims.items()
    }
