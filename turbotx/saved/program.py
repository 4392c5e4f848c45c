"""Program: runs one compiled call of a saved file from its tables; decides and compiles nothing.

In: the tables of `saved.describe`, and a runtime: for a CPU, of the file's libraries. Out: the
outputs of a call, at any sizes the capture holds for, as `runtime.program` would give them::

    dims = program.match([t.shape for t in tensors])      # None where the capture does not hold
    output = program.answer(program.bind(dims), tensors)
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from turbotx.capture.traced_float import FloatInput
from turbotx.memory.planner.plan import Lifetime, Planner, Workload
from turbotx.memory.planner.restore import restore_planner
from turbotx.memory.pool import ChunkPool
from turbotx.runtime.cpu.abi import LaunchRecord
from turbotx.runtime.cpu.segments import CpuExecutor, Packing
from turbotx.runtime.executable import (
    Binding,
    Formulas,
    Output,
    Places,
    PlannedCall,
    Runtime,
    make_size,
)
from turbotx.runtime.state import Evaluate, Maker, Step
from turbotx.runtime.weights import Kind, Weights
from turbotx.saved.calls import decode_nodes
from turbotx.saved.native import Libraries
from turbotx.saved.steps import alias_of, make_step, window_of
from turbotx.saved.values import compile_texts, decode_constant, decode_tree

MAX_SHAPES = 256


@dataclass(frozen=True)
class _Window:
    """What a packed weight is made of: a window on a tensor, by strides."""

    tensor: str
    shape: Sequence[int]
    strides: Sequence[int]
    offset: int


class SavedProgram(PlannedCall):
    """One compiled call."""

    def __init__(self, tables: Mapping[str, Any], runtime: Runtime, pool: ChunkPool) -> None:
        self.tables = tables
        dims = tuple(tables["dims"])
        self._matcher = _Matcher(tables, dims)
        self.floats = tuple(
            FloatInput(place, decode_constant(fixed), nonzero)
            for place, fixed, nonzero in tables["floats"]
        )
        super().__init__(
            _read_formulas(tables, dims),
            Places(
                inputs=[(x["tensor"], x["slot"]) for x in tables["inputs"]],
                outputs=[
                    Output(o["name"], o["slot"], len(o["shape"]), decode_constant(o["dtype"]))
                    for o in tables["outputs"]
                ],
                planned=[(name, place, slot) for name, place, slot in tables["memory"]["planned"]],
                orders=[x["order"] for x in tables["inputs"]],
                raw={x["tensor"] for x in tables["inputs"] if x["raw"]},
            ),
            _read_planner(tables["memory"]),
            runtime,
            pool,
            MAX_SHAPES,
        )
        self._leaves = [self._leaf(leaf) for leaf in tables["leaves"]]

    @property
    def builds(self) -> int:
        """How many kernels had to be compiled since it was loaded."""
        return 0

    def serves(self, dims: Sequence[int]) -> bool:
        """Tell whether it, and not another program of the same call, is to run at these dims."""
        return True

    def match(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        """Return the dims of a call's shapes in order, None where the capture does not hold."""
        return self._matcher.match(shapes)

    def explain(self, shapes: Sequence[Sequence[int]]) -> str:
        """Return why `match` gives None."""
        return self._matcher.solve(shapes)[1]

    def answer(self, binding: Binding, tensors: Sequence[torch.Tensor]) -> Any:
        """Run on a call's tensors, in order; return the model's output, nested as it was."""
        return decode_tree(self.tables["out"], self.run(binding, tensors).__getitem__)

    def _leaf(self, leaf: Mapping[str, Any]) -> Maker:
        if "tensor" in leaf:
            name = leaf["tensor"]
            return lambda state: state.tensors[name]
        if "window" in leaf:
            return window_of(leaf["window"], self.dims)
        if "alias" in leaf:
            return alias_of(leaf, self.dims)
        if "size" in leaf:
            return make_size(compile_texts([leaf["size"]], self.dims))
        constant = decode_constant(leaf["constant"])
        return lambda state: constant

    def _check_of(self, launch: int, check: int) -> tuple[str, str, str, str]:
        failed = self.tables["launches"][launch]
        name, limit = failed["checks"][check]
        return name, limit, failed["name"], failed["source"]


def _read_formulas(tables: Mapping[str, Any], dims: tuple[str, ...]) -> Formulas:
    def compiled(texts: Sequence[str]) -> Evaluate:
        return compile_texts(texts, dims)

    requirements = tables["requirements"]
    return Formulas(
        dims=dims,
        values=compiled(tables["values"]),
        class_nbytes=compiled(tables["memory"]["class_nbytes"]),
        requirements=compiled([text for text, _ in requirements]),
        requirement_texts=[words for _, words in requirements],
        output_extents=compiled([e for o in tables["outputs"] for e in o["shape"]]),
    )


def _read_planner(memory: Mapping[str, Any]) -> Planner:
    lifetimes = tuple(Lifetime(*x) for x in memory["lifetimes"])
    workload = Workload(lifetimes, tuple(memory["size_class"]), tuple(memory["names"]))
    return restore_planner(memory["planner"], workload, memory["orientations"])


def read_weights(
    tables: Mapping[str, Any], model: nn.Module, constants: Mapping[str, torch.Tensor],
    place: torch.device,
) -> Weights:  # fmt: skip
    """Return what a program derives from its parameters, on the device where they lie."""
    weights = tables["weights"]
    nodes = decode_nodes(weights["prepared"], place)
    prepared = {name: nodes[name] for name in weights["prepared_names"]}
    kinds = {
        name: Kind(decode_constant(k["dtype"]), tuple(k["shape"]), tuple(k["strides"]), place)
        for name, k in weights["kinds"].items()
    }
    return Weights(model, constants, weights["paths"], prepared, kinds)


class SavedCpuRuntime(CpuExecutor):
    """Launches from a file's tables and libraries."""

    def __init__(self, tables: Mapping[str, Any], libraries: Libraries, weights: Weights) -> None:
        self._tables, self._libraries = tables, libraries
        self._arrays: list[Any] = []  # what the records point at
        launches, described = tables["launches"], tables["weights"]
        records = (LaunchRecord * max(1, len(launches)))()
        steps: dict[int, Step] = {}
        for k, launch in enumerate(launches):
            if "aten" in launch:
                steps[k] = make_step(launch["aten"], tables["dims"], torch.device("cpu"))
            else:
                self._fill(records[k], launch)
        super().__init__(
            weights,
            libraries.open(tables["libraries"]["runtime"]),
            records,
            tables["segments"],
            steps,
            weight_slots=described["slots"],
            packings=[
                Packing(
                    w["slot"],
                    _Window(w["tensor"], w["shape"], w["strides"], w["offset"]),
                    w["options"],
                )
                for w in described["packed"]
            ],
            slot_count=tables["slot_count"],
        )

    def _fill(self, record: LaunchRecord, launch: Mapping[str, Any]) -> None:
        library = self._libraries.open(self._tables["libraries"][launch["library"]])
        function = getattr(library, launch["symbol"])
        record.call = ctypes.cast(function, ctypes.c_void_p).value
        record.arg_count, record.size_count = len(launch["slots"]), len(launch["sizes"])
        for field in ("slots", "offsets", "sizes"):
            array = (ctypes.c_int32 * max(1, len(launch[field])))(*launch[field])
            setattr(record, field, array)
            self._arrays.append(array)


class _Matcher:
    """Solves a call's shapes for the dims, and checks what tracing assumed of them."""

    def __init__(self, tables: Mapping[str, Any], dims: Sequence[str]) -> None:
        self._dims, self._inputs = dims, tables["inputs"]
        self._sizes = compile_texts([s["text"] for x in self._inputs for s in x["sizes"]], dims)
        self._guards = [
            (compile_texts([condition], dims), text) for condition, text in tables["guards"]
        ]

    def match(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        dims, failed = self.solve(shapes)
        return None if failed else dims

    def solve(self, shapes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], str]:
        found: dict[str, int] = {}
        places = [
            (f"{x['name']}.shape[{d}]", size, actual)
            for x, shape in zip(self._inputs, shapes, strict=True)
            for d, (size, actual) in enumerate(zip(x["sizes"], shape, strict=True))
        ]
        # A size that is a dim itself says it without doubt; those that only contain one come after.
        for place, size, actual in sorted(places, key=lambda p: p[1]["text"] not in self._dims):
            name, slope, rest = size.get("solve", (None, 1, 0))
            if name is None or name in found:
                continue
            if slope == 0 or (actual - rest) % slope:
                return (), f"{place} is {actual}, which is no {size['text']}"
            found[name] = (actual - rest) // slope
        if set(found) != set(self._dims):
            return (), f"{', '.join(set(self._dims) - set(found))} does not follow from the inputs"
        dims = tuple(found[name] for name in self._dims)
        for (place, size, actual), expected in zip(places, self._sizes(*dims), strict=True):
            if actual != expected:
                return (), f"{place} is {actual}, not {size['text']} = {expected}"
        for name, value in found.items():
            if value < 1:
                return (), f"{name} is {value}; a call with a size of 0 is captured by itself"
        for holds, text in self._guards:
            if not all(holds(*dims)):
                return (), f"{text} does not hold"
        return dims, ""
