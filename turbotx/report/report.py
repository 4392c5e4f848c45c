"""Report: what turbotx made of a model, for reading, for programs and for notebooks.

In: a model and example inputs. Out: a `Report` that prints as tables, draws as HTML and turns into
plain lists and numbers for JSON::

    report = turbotx.explain(model, input_ids=ids, attention_mask=mask)
    report.where("gelu")        # Place(status="fused", launches=("fused_add_gelu_0",), ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from turbotx import ir
from turbotx.engine import Engine
from turbotx.errors import InputError
from turbotx.fused_graph import make_fused_graph
from turbotx.optimized import engine_of
from turbotx.pipeline import Compiled
from turbotx.report import entries
from turbotx.report.adversarial import stress
from turbotx.report.cost import eager_nbytes
from turbotx.report.describe import (
    View,
    describe_externs,
    describe_gemms,
    describe_kernels,
    describe_launches,
    describe_plan,
    describe_regions,
)
from turbotx.report.dump import Dumped, dump
from turbotx.report.findings import Findings
from turbotx.report.html import render_miniature, render_page
from turbotx.report.numerics import Error, Numerics, measure
from turbotx.report.origin import Origin, observe, simulate
from turbotx.report.profile import Profile, profile
from turbotx.report.where import find_place
from turbotx.signature import SizeMatcher


@dataclass(frozen=True)
class Report:
    """One compiled call at one shape.

    dims: the value of every symbolic size. findings: what running and building showed at it.
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

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The fused graph: an ordinary torch.fx.GraphModule, a region a submodule."""
        return make_fused_graph(self.compiled)

    @cached_property
    def _view(self) -> View:
        return View(self.compiled, self.dims)

    @cached_property
    def regions(self) -> list[entries.Region]:
        return describe_regions(self._view)

    @cached_property
    def kernels(self) -> list[entries.Kernel]:
        return describe_kernels(self._view)

    @cached_property
    def launches(self) -> list[entries.Launch]:
        return describe_launches(self._view)

    @cached_property
    def gemms(self) -> list[entries.Gemm]:
        return describe_gemms(self._view)

    @cached_property
    def externs(self) -> list[entries.Extern]:
        return describe_externs(self._view)

    @cached_property
    def memory(self) -> entries.Memory:
        held = simulate(self.origin, self.dims)
        return describe_plan(self._view, self.planner, held)

    @cached_property
    def eager(self) -> entries.Eager:
        """The captured model as PyTorch runs it, to compare with."""
        moved = eager_nbytes(self.origin)
        return entries.Eager(len(moved), sum(self._view.number(n) for n in moved.values()))

    def at(self, **dims: int) -> Report:
        """Return the report at another shape, e.g. at(batch=8, seq=128); nothing is compiled.

        A dim that is not named follows a named one that had its size so far, and otherwise stays.
        Raises InputError for a dim that the model does not have or a size below 1.
        """
        findings = Findings(resources=self.findings.resources)  # the others are of one shape
        wanted = follow(self.dims, dims)
        compiled = self.compiled.at(tuple(wanted.values()))
        return replace(self, compiled=compiled, dims=wanted, findings=findings)

    def with_findings(self, **found: Any) -> Report:
        """Return the report with more findings: numerics, profile or resources, see `Findings`."""
        return replace(self, findings=replace(self.findings, **found))

    def where(self, node: str | fx.Node) -> entries.Place:
        """Return what became of an op of the captured model, or of a node of `graph`.

        A region of `graph` is found by its name as well. Raises InputError for a name that stands
        in none of the graphs.
        """
        name = node.meta.get("rewritten", node.name) if isinstance(node, fx.Node) else node
        return find_place(self, name)

    def source_nodes(self, launch: str) -> list[entries.Place]:
        """Return the captured model's ops that a launch computes: the way back from `where`."""
        places = (self.where(n.name) for n in self.origin.nodes)
        return [p for p in places if launch in p.launches]

    def function_of(self, launch: ir.Launch) -> str:
        """Return the name of the generated function behind a launch, "" where there is none."""
        return self._view.function_of(launch)

    def numerics(self, model: Any, /, *args: Any, **kwargs: Any) -> Numerics:
        """Return every launch's error, and the outputs', on one call's inputs, against float64.

        `model`: the module, plain or optimized, whose own error is the measure. Runs everything
        three times.
        """
        return self.numerics_of(engine_of(model), args, kwargs)

    def numerics_of(
        self, engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Numerics:
        """Return the same for the model behind an engine."""
        return measure(engine, self.compiled, args, kwargs, self.function_of, self.dims)

    def stress(self, *args: Any, **kwargs: Any) -> dict[str, tuple[Error, ...]]:
        """Return, by case, the error of every kernel on inputs that break careless arithmetic.

        The call's inputs give shapes and indices; the cases are those of `report.adversarial`.
        """
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        return stress(self.compiled, tensors, self.function_of, self.dims)

    def profile(self, *args: Any, runs: int = 30, **kwargs: Any) -> Profile:
        """Return the time of every launch, medians over `runs` runs on one call's inputs."""
        return profile(self, args, kwargs, runs)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists, strings and numbers, ready for JSON."""
        return {
            "model": self.name,
            "dims": dict(self.dims),
            "regions": [asdict(r) for r in self.regions],
            "kernels": [asdict(k) for k in self.kernels],
            "launches": [asdict(x) for x in self.launches],
            "gemms": [asdict(x) for x in self.gemms],
            "externs": [asdict(x) for x in self.externs],
            "memory": asdict(self.memory),
            "eager": asdict(self.eager),
            "resources": self.findings.resources_as_dicts(),
            "numerics": self.findings.numerics_as_dicts(),
            "times_us": self.findings.times_us(),
        }

    def dump(self, folder: str | Path) -> Dumped:
        """Write every stage into a folder: graphs, kernels, plan, report.json and report.html.

        Raises DumpError where a file stands in the way.
        """
        return dump(self, Path(folder))

    def to_html(self) -> str:
        """Return a page that stands alone: no network, light and dark, any shape."""
        return render_page(self)

    def _repr_html_(self) -> str:
        return render_miniature(self)

    def __rich__(self) -> Any:
        # Only a terminal needs rich: compiling, running and measuring do without.
        from turbotx.report.table import render_table

        return render_table(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def __repr__(self) -> str:
        shape = ", ".join(f"{k}={v}" for k, v in self.dims.items())
        return f"<turbotx report of {self.name} at {shape}: print() it, or .to_html()>"


def follow(dims: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    """Return `dims` with the given ones changed, and those changed along that had their sizes."""
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


def explain(model: Any, /, *args: Any, **kwargs: Any) -> Report:
    """Compile `model(*args, **kwargs)` and return what every stage made of it.

    `model` is a module, an optimized module or a function of tensors; its own options apply where
    it is optimized. Nothing is run, the inputs are only looked at. Raises InputError without a
    tensor among the inputs, and what `turbotx.optimize` raises.
    """
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if not tensors:
        raise InputError("explain needs example inputs, as in explain(model, input_ids=ids)")
    engine = engine_of(model)
    engine.refuse_training()
    captured = engine.capture(args, kwargs)
    origin = observe(captured)
    compiled = engine.compile(captured)
    sizes = SizeMatcher(captured).match([t.shape for t in tensors])
    dims = dict(zip(captured.dims, sizes or captured.example_dims, strict=True))
    return Report(compiled.at(tuple(dims.values())), origin, dims, engine.options.planner)
