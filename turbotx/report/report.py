"""Report: what turbotx made of a model, for readers, programs and notebooks.

In: a model and example inputs. Out: a `Report` that prints as tables, renders as HTML and converts
to plain lists and numbers for JSON::

    report = turbotx.explain(model, input_ids=ids, attention_mask=mask)
    report.where("gelu")        # NodeEntry(status="fused", launches=("fused_add_gelu_0",), ...)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from turbotx.capture.arguments import tensors_of
from turbotx.engine.cached_engine import plain_call
from turbotx.engine.compiled import Compiled
from turbotx.engine.engine import Engine
from turbotx.engine.optimize import engine_of
from turbotx.errors import InputError
from turbotx.report.adversarial import stress
from turbotx.report.dump import Dumped, dump
from turbotx.report.entries import NodeEntry
from turbotx.report.html import render_miniature, render_page
from turbotx.report.numerics import Error, Numerics, measure
from turbotx.report.origin import observe
from turbotx.report.profile import Profile, profile
from turbotx.report.record import Record
from turbotx.report.where import find_place
from turbotx.runtime.packed_program import PackedProgram


@dataclass(frozen=True, repr=False)
class Report(Record):
    """A record with queries: what became of an op, how fast and how exact launches are.

    engine: the engine that compiled the call.
    """

    engine: Engine = field(kw_only=True)

    def where(self, node: str | fx.Node) -> NodeEntry:
        """Return what became of an op of the captured model, or of a node of `graph`.

        A region of `graph` is also found by its name. Raises InputError for a name in neither
        graph.
        """
        return find_place(self, node)

    def source_nodes(self, launch: str) -> list[NodeEntry]:
        """Return the captured model's ops that a launch computes: the inverse of `where`. Empty for
        an unknown name."""
        places = (self.where(n.name) for n in self.origin.nodes)
        return [p for p in places if launch in p.launches]

    def numerics(self, model: Any, /, *args: Any, **kwargs: Any) -> Numerics:
        """Return the error of every launch, and of the outputs, against float64 on one call's
        inputs.

        model: the module, plain or optimized, whose own error is the reference. Runs everything
        three times, on a copy of a key/value cache. Errors are largest absolute differences; there
        are none for outputs that draw random numbers. Raises InputError for inputs of another call.
        """
        return self.numerics_of(*plain_call(engine_of(model), args, kwargs))

    def numerics_of(
        self, engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Numerics:
        """Return the same for the model of an engine."""
        return measure(engine, self.compiled, args, kwargs, self.function_of, self.dims)

    def stress(self, *args: Any, **kwargs: Any) -> dict[str, tuple[Error, ...]]:
        """Return, by case, the error of every kernel on numerically difficult inputs.

        The call's inputs provide shapes and indices; the cases are those of `report.adversarial`.
        Raises InputError for inputs of another call.
        """
        tensors = tensors_of(*self.plain_call(args, kwargs))
        return stress(self.compiled, tensors, self.function_of, self.dims)

    def profile(self, *args: Any, runs: int = 30, **kwargs: Any) -> Profile:
        """Return the time of every launch in µs, medians over `runs` runs on one call's inputs.

        Runs on a copy of a key/value cache. Raises InputError for inputs of another call.
        """
        return profile(self.compiled, self.launches, *self.plain_call(args, kwargs), runs)

    def plain_call(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return a call's arguments as its program takes them: a key/value cache as tensors, on a
        copy of its memory."""
        _, args, kwargs = plain_call(self.engine, args, kwargs)
        return args, dict(kwargs)

    def dump(self, folder: str | Path) -> Dumped:
        """Write every stage into a folder: graphs, kernels, plan, report.json and report.html.

        Raises DumpError if a file is in the way.
        """
        return dump(self, Path(folder))

    def to_html(self) -> str:
        """Return a self-contained page: no network, light and dark themes, any shape."""
        return render_page(self)

    def _repr_html_(self) -> str:
        return render_miniature(self)

    def __rich__(self) -> Any:
        # Imported here, so that compiling, running and measuring do not need rich.
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


def find_dims(compiled: Compiled, tensors: Sequence[torch.Tensor]) -> dict[str, int]:
    """Return the values of a compiled call's dims for these inputs, including the number of tokens
    of a packed one."""
    captured = compiled.captured
    sizes = captured.matcher.match([t.shape for t in tensors]) or captured.example_dims
    if isinstance(compiled.program, PackedProgram) and len(sizes) < len(captured.dims):
        sizes = (*sizes, compiled.program.find_mixture(sizes, tensors).tokens)
    return dict(zip(captured.dims, sizes, strict=True))


def explain(model: Any, /, *args: Any, **kwargs: Any) -> Report:
    """Compile `model(*args, **kwargs)` and return what every stage made of it.

    model: a module, an optimized module (whose options apply) or a function of tensors. Nothing is
    run; the inputs only provide shapes. Raises InputError without a tensor among the inputs, and
    what `turbotx.optimize` raises.
    """
    return explain_call(engine_of(model), args, kwargs)


def explain_call(
    engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: str | None = None
) -> Report:
    """Return the report of a call of an engine's model, compiled for a target: "cpu" or a GPU such
    as "sm_90", which need not be present; None for the inputs' device. Raises InputError without
    inputs."""
    plain, args, kwargs = plain_call(engine, args, kwargs)
    tensors = tensors_of(args, kwargs)
    if not tensors:
        raise InputError("explain needs example inputs, as in explain(model, input_ids=ids)")
    engine.refuse_training()
    captured = plain.capture(args, kwargs)
    origin = observe(captured)
    compiled = plain.compile(captured, target)
    dims = find_dims(compiled, tensors)
    at = compiled.at(tuple(dims.values()))
    return Report(at, origin, dims, engine.options.planner, engine=engine)
