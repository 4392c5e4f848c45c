"""Numerics: every launch, and the whole model, against float64.

In: a model and one call's inputs. Out: per launch, its error beside that of PyTorch's own ops on
the same inputs. The rule: at most 1.5 x eager's error plus 2 ulp of the largest value. Eager's
error is the largest relative error of all launches of one kind: at one token a launch has a few
hundred numbers, and eager's error on a single one of them is chance::

    measure(model, report, args, kwargs)  ->  Numerics(launches=(Error("linear_0", ...), ...), ...)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx

from turbotx import ir
from turbotx.capture.arguments import tensors_of
from turbotx.engine.compiled import Compiled
from turbotx.engine.engine import Engine
from turbotx.ir.expr import compile_evaluator
from turbotx.ir.fx_nodes import draws
from turbotx.ir.quantized_ops import (
    KIND_NAMES,
    LEVELS,
    quantize_affine,
    quantize_affine_by,
    quantize_rows,
    unrounded_affine,
    unrounded_affine_by,
    unrounded_rows,
)
from turbotx.program.meaning import meaning_of
from turbotx.report.replay import Read, replay
from turbotx.runtime.packed_program import PackedProgram
from turbotx.runtime.program import Program

FACTOR, ULPS = 1.5, 2


@dataclass(frozen=True)
class Error:
    """The largest differences from float64 of one launch, or of one leaf of the model's output.

    largest: the largest finite value in float64.
    allowed: the bound for turbotx.
    applies: False for results in float64, which no wider type can measure: half of their digits
    must agree with PyTorch's, and `eager` is meaningless.
    """

    name: str
    kernel: str
    module: str
    eager: float
    turbotx: float
    largest: float
    allowed: float
    applies: bool = True

    @property
    def relative(self) -> float:
        """The error over the largest true value; the error itself if that is 0."""
        return self.turbotx / self.largest if self.largest else self.turbotx

    @property
    def holds(self) -> bool:
        """Whether the error is within the bound; False for NaN."""
        return self.turbotx <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Likeness:
    """The cost of quantisation: the similarity of a result to the float model's.

    mean, worst: of the cosines of rows (the result's last dim), without rows that are zero or not
    finite; NaN if there are none.
    rows: their number.
    """

    name: str
    mean: float
    worst: float
    rows: int


@dataclass(frozen=True)
class Numerics:
    """Errors of every launch on its actual inputs, and of the model's outputs.

    likenesses: replace the outputs' errors if a model is quantised, since the float model then
    computes something else.
    """

    launches: tuple[Error, ...]
    outputs: tuple[Error, ...]
    likenesses: tuple[Likeness, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every launch and every output is within its bound."""
        return all(e.holds for e in (*self.launches, *self.outputs))


def measure(
    engine: Engine, compiled: Compiled, args: tuple[Any, ...], kwargs: Mapping[str, Any],
    names: Callable[[ir.Launch], str], dims: Mapping[str, int],
) -> Numerics:  # fmt: skip
    """Run a model three ways on one call's inputs.

    names: maps a launch to its function's name. Not thread-safe for `compiled`.
    """
    tensors = tensors_of(args, kwargs)
    watch = LaunchErrors(compiled, names, dims)
    ours = replay(compiled, tensors, watch)
    if any(_draws(x) for x in compiled.assembly.launches):
        return Numerics(watch.found, ())  # random draws differ, so outputs cannot be compared
    outputs = measure_outputs(engine, compiled.program, args, kwargs, ours)
    return replace(outputs, launches=watch.found)


def measure_outputs(
    engine: Engine, program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any],
    ours: Sequence[Any],
) -> Numerics:  # fmt: skip
    """Compare the outputs of a call, as leaves, with those of an engine's model and of its captured
    graph in float64; for a quantised program, return their similarity.

    program: that which computed `ours`; it defines the memory order of inputs. Outputs that are not
    tensors are skipped.
    """
    tensors = tensors_of(args, kwargs)
    exact_graph = _to_float64(engine.capture(args, kwargs).graph_module)
    given = program.in_memory(tensors)
    eager = pytree.tree_leaves(engine.run_eager(args, kwargs))
    with torch.no_grad():
        exact = exact_graph(*map(_double, given))
    if isinstance(program, PackedProgram):
        mask = tensors[program.packing.mask]
        eager, exact = (program.without_padding(x, mask) for x in (eager, exact))
        ours, eager, exact = (program.without_empty_rows(x, mask) for x in (ours, eager, exact))
    # Side effects follow the call's own results, which eager returns.
    found = enumerate(zip(ours, eager, exact, strict=False))
    pairs = [(f"output {k}", x) for k, x in found if isinstance(x[1], torch.Tensor)]
    # Of a saved program, launches alone tell.
    kinds = tuple(f"linear_{name}" for name in KIND_NAMES.values())
    quantized = any(launch.name.startswith(kinds) for launch in program.executable.launches)
    if engine.options.quantize != "none" or quantized:
        floats = [(name, x) for name, x in pairs if _is_float(x[1])]
        return Numerics((), (), tuple(liken(name, mine, true) for name, (mine, _, true) in floats))
    return Numerics((), tuple(compare(name, "", "", *x) for name, x in pairs))


def _draws(launch: ir.Launch) -> bool:
    """Return whether a launch draws random numbers."""
    if not isinstance(launch, ir.AtenLaunch):
        return False
    call = launch.call
    return draws(call.target, call.args, call.kwargs)


class LaunchErrors:
    """Computes each launch by PyTorch and in float64 from its inputs, and compares its results."""

    def __init__(
        self, compiled: Compiled, names: Callable[[ir.Launch], str], dims: Mapping[str, int]
    ) -> None:
        self.launches, self.names, self.dims = compiled.assembly.launches, names, dims
        self._all: list[list[tuple[Hashable, Error]]] = []
        self._expected: list[tuple[ir.Operand, torch.Tensor, torch.Tensor]] = []

    def before(self, index: int, read: Read) -> None:
        """Compute what a launch should write, in its own dtypes and in float64, from its inputs."""
        self._expected = []
        if _draws(self.launches[index]):
            return
        call = meaning_of(self.launches[index])
        args, kwargs = self._fill((call.args, dict(call.kwargs)), read)
        eager = _as_list(call.target(*args, **kwargs))
        true = _as_list(_exact(call)(*_double_tree(args), **_double_tree(kwargs)))
        made = zip(call.writes, eager, true, strict=True)
        self._expected = [(w, own, exact) for w, own, exact in made if w is not None]

    def after(self, index: int, read: Read) -> None:
        """Compare what a launch wrote; keeps its worst tensor."""
        launch = self.launches[index]
        found = [
            compare(launch.name, self.names(launch), launch.module, read(window), own, true)
            for window, own, true in self._expected
        ]
        if found:
            kind = self._kind_of(launch)
            self._all.append([((kind, k), error) for k, error in enumerate(found)])

    def _kind_of(self, launch: ir.Launch) -> Hashable:
        """Return a key of launches with the same arithmetic: a kernel, or an op and its sizes."""
        shapes = tuple(a.shape for a in launch.operands if a is not None)
        return self.names(launch) or (launch.name.rpartition("_")[0], shapes)

    @property
    def found(self) -> tuple[Error, ...]:
        """The worst error of every launch, with the bound for launches of its kind."""
        pooled = iter(pool([entry for errors in self._all for entry in errors]))
        return tuple(
            max((next(pooled) for _ in errors), key=lambda e: (not e.holds, e.relative))
            for errors in self._all
        )

    def _fill(self, structure: Any, read: Read) -> Any:
        """Return call arguments with tensors in place of operands and values in place of
        formulas."""
        if isinstance(structure, ir.Operand):
            return read(structure)
        if isinstance(structure, sympy.Basic):
            (value,) = compile_evaluator([structure], list(self.dims))(*self.dims.values())
            return value
        if isinstance(structure, (list, tuple)):
            return [self._fill(v, read) for v in structure]
        if isinstance(structure, dict):
            return {k: self._fill(v, read) for k, v in structure.items()}
        return structure


def _exact(call: ir.AtenCall) -> Callable[..., Any]:
    """Return a call's target in float64."""
    graph = call.target
    if isinstance(graph, fx.GraphModule):
        return _to_float64(graph)
    return _without_dtypes(UNROUNDED.get(str(graph), graph))


def _without_dtypes(target: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*_widen(args), **_widen(kwargs))

    return call


def _widen(value: Any) -> Any:
    """Replace every floating-point dtype among arguments by float64, but for quantised ones."""
    return fx.node.map_aggregate(
        value, lambda v: torch.float64 if isinstance(v, torch.dtype) and _is_wide(v) else v
    )


def _unrounded(
    x: torch.Tensor, scale: Any, zero: Any, low: int, high: int, dtype: torch.dtype
) -> torch.Tensor:
    return unrounded_affine(x, 1.0 / scale, zero, low, high)


def _dequantized(x: torch.Tensor, scale: Any, zero: Any, *rest: Any) -> torch.Tensor:
    return (x - zero) * scale


def _chosen(x: torch.Tensor, *rest: Any) -> Any:
    made: Any = torch.ops.quantized_decomposed.choose_qparams.tensor(x.float(), *rest)
    return made


def _by_channel(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, axis: int, *rest: Any
) -> torch.Tensor:
    shown = [-1 if d == axis else 1 for d in range(x.dim())]
    moved = x if zero is None else x - zero.view(shown)
    return moved * scale.view(shown)


UNROUNDED: dict[str, Callable[..., Any]] = {
    str(quantize_rows): unrounded_rows,
    str(quantize_affine): unrounded_affine,
    str(quantize_affine_by): unrounded_affine_by,
    # Of PyTorch's quantiser, which take float32 alone.
    "quantized_decomposed.choose_qparams.tensor": _chosen,
    "quantized_decomposed.quantize_per_tensor.default": _unrounded,
    "quantized_decomposed.quantize_per_tensor.tensor": _unrounded,
    "quantized_decomposed.dequantize_per_tensor.default": _dequantized,
    "quantized_decomposed.dequantize_per_tensor.tensor": _dequantized,
    "quantized_decomposed.dequantize_per_channel.default": _by_channel,
}
"""In the place of what rounds to integers, by name."""


def _to_float64(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph with parameters and casts in float64, and without rounding to int8."""
    module = copy.deepcopy(module).double()
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.target = UNROUNDED.get(str(node.target), node.target)
            node.args, node.kwargs = _widen(node.args), _widen(node.kwargs)
    module.recompile()
    return module


def _double(value: Any) -> Any:
    return value.double() if _is_float(value) else value


def _double_tree(value: Any) -> Any:
    return pytree.tree_map(_double, value)


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def compare(
    name: str, kernel: str, module: str,
    ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor,
) -> Error:  # fmt: skip
    """Return the largest differences; equal infinities and NaNs at the same index count as 0.

    All tensors have one shape; they are compared in float64.
    """
    rounds = exact.is_floating_point() and not ours.is_floating_point()
    exact = exact.double().reshape(ours.shape)
    if ours.dtype in LEVELS and ours.is_floating_point():
        own, mine = (_beyond_rounding(t, exact) for t in (eager, ours))
        largest = exact.abs().max().item()
        past = FACTOR * own + ULPS * torch.finfo(torch.float32).eps * largest
        return Error(name, kernel, module, own, mine, largest, past)
    if ours.is_floating_point():
        # Where float32 itself overflows, or has other NaNs, eager is no reference.
        unlike = (eager.isfinite() != exact.isfinite()) | (eager.isnan() != exact.isnan())
        ours, eager = (torch.where(unlike, exact.to(t.dtype), t) for t in (ours, eager))
        exact = torch.where(unlike, ours.double(), exact)
    finite = exact.double()[torch.isfinite(exact.double())].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    own, mine = difference(eager, exact), difference(ours, exact)
    if rounds:  # int8 rows: rounding accounts for half; anything beyond is an error
        past = FACTOR * max(0.0, own - 0.5) + ULPS * torch.finfo(torch.float32).eps * largest
        return Error(name, kernel, module, own, mine, largest, 0.5 + past)
    ulp = torch.finfo(ours.dtype).eps * largest if ours.is_floating_point() else 0.0
    if ours.dtype == torch.float64:
        half = torch.finfo(ours.dtype).eps ** 0.5 * largest
        return Error(name, kernel, module, own, mine, largest, half, applies=False)
    return Error(name, kernel, module, own, mine, largest, FACTOR * own + ULPS * ulp)


def liken(name: str, ours: torch.Tensor, exact: torch.Tensor) -> Likeness:
    """Return the cosines between a result's rows and those of the float model in float64."""
    rows = [x.double().reshape(-1, x.shape[-1] if x.dim() else 1) for x in (ours, exact)]
    kept = (rows[0] * rows[1]).isfinite().all(-1) & (rows[1] != 0).any(-1)
    cosines = torch.nn.functional.cosine_similarity(rows[0][kept], rows[1][kept], -1)
    if not cosines.numel():
        return Likeness(name, math.nan, math.nan, 0)
    return Likeness(name, cosines.mean().item(), cosines.min().item(), cosines.numel())


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and _is_wide(value.dtype)


def _is_wide(dtype: torch.dtype) -> bool:
    """Return whether a dtype is floating point, and not one to quantise to, such as fp8."""
    return dtype.is_floating_point and dtype not in LEVELS


def _beyond_rounding(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return by how much numbers of fp8 are farther from float64 than half a step, at most."""
    kind = torch.finfo(found.dtype)
    octave = torch.frexp(exact.abs().clamp_min(kind.tiny)).exponent - 1
    half = torch.ldexp(torch.full_like(exact, kind.eps / 2), octave)
    return ((found.double() - exact).abs() - half).clamp_min(0.0).max().item()


def pool(errors: Sequence[tuple[Hashable, Error]]) -> list[Error]:
    """Return the errors with bounds raised to what eager's worst error of the same kind allows."""
    worst: dict[Hashable, float] = {}
    for kind, e in errors:
        if e.applies and e.largest and math.isfinite(e.eager):
            worst[kind] = max(worst.get(kind, 0.0), e.eager / e.largest)
    return [
        replace(
            e, allowed=e.allowed + FACTOR * max(0.0, worst.get(kind, 0.0) * e.largest - e.eager)
        )
        for kind, e in errors
    ]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference of two tensors of one shape, in float64; NaN if only one has a
    NaN."""
    a, b = a.double(), b.double().reshape(a.shape)
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs())
    return apart.max().item() if apart.numel() else 0.0
