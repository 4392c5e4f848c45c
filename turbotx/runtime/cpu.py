"""The CPU runtime: native launches in one call, the rest through PyTorch between them.

In: an assembly and the program's weights. Out: something that runs it over an address table::

    runtime.run(execution, binding, arena, named)   # 0, or which launch failed and why
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from turbotx import ir
from turbotx.assemble import Assembly
from turbotx.errors import BuildWarning, NoCompilerError
from turbotx.kernels.build import build_library
from turbotx.kernels.lower import Lowered
from turbotx.layout import contiguous_strides
from turbotx.passes.extract import extract
from turbotx.runtime.native import LaunchTable, load_runtime, packed_name, print_units
from turbotx.runtime.weights import PackedWeight, Weights
from turbotx.sizes import Expr, compile_evaluator

aten = torch.ops.aten


class CpuRuntime:
    """Builds a program's kernels and executes its launches. `builds` counts compilations."""

    def __init__(self, assembly: Assembly, weights: Weights, backend: str, dims: Sequence[str]) -> None:
        self.assembly, self.weights = assembly, weights
        self.builds = 0
        self.native: ctypes.CDLL | None = None
        self.sources: dict[str, str] = {}
        self._packed: dict[str, PackedWeight] = {}
        self._packed_version = 0
        kernels, names = None, {}
        kinds: frozenset[str] = frozenset()
        if backend != "aten":
            try:
                self.sources, names = print_units(assembly)
                kernels = self._build()
                kinds = frozenset({"kernel", "gemm", "attention"})
            except NoCompilerError as error:
                if backend == "cpp":
                    raise
                warnings.warn(
                    f"{error}; until then regions run through ATen, in planned memory, slower",
                    BuildWarning,
                    stacklevel=2,
                )
        self.table = LaunchTable(assembly, kinds, self.native, kernels, names)  # type: ignore[arg-type]
        self.native_kinds = kinds
        self._gemm_weights = {
            packed_name(x.args[1]): x.args[1]
            for x in assembly.launches
            if x.kind == "gemm" and kinds and x.args[1] is not None
        }
        self._steps = {
            i: self._aten_step(launch, dims)
            for i, launch in enumerate(assembly.launches)
            if launch.kind not in kinds
        }
        self._records = ctypes.addressof(self.table.records)

    def _build(self) -> ctypes.CDLL | None:
        self.native, built = load_runtime()
        self.builds += built
        if not self.sources:
            return None
        library, built = build_library(self.sources)
        self.builds += built
        return library

    # --- weights ---

    def fill_weights(self, table: Any) -> None:
        """Write the addresses of parameters, prepared constants and packed weights."""
        slots = self.table.slots
        for name, tensor in self.weights.tensors.items():
            if name in slots:
                table[slots[name]] = tensor.data_ptr()
        if self._packed_version != self.weights.version:
            assert self.native is not None or not self._gemm_weights
            self._packed = {
                name: PackedWeight(self.native, self.weights.window(operand))  # type: ignore[arg-type]
                for name, operand in self._gemm_weights.items()
            }
            self._packed_version = self.weights.version
        for name, packed in self._packed.items():
            table[slots[name]] = packed.address

    # --- running ---

    def run(
        self, execution: Any, binding: Any, arena: Any, named: Mapping[str, torch.Tensor], ticks: Any
    ) -> int:
        """Run every launch in order; return 0, or launch << 32 | code of the first that failed."""
        table, sizes = ctypes.addressof(execution.table), ctypes.addressof(binding.sizes)
        clock = None if ticks is None else ctypes.addressof(ticks)
        for begin, end in self.table.segments:
            step = self._steps.get(begin)
            if step is not None:
                step(binding.dims, execution, arena, named)
                continue
            assert self.native is not None
            failed = self.native.ttx_run(self._records, begin, end, table, sizes, clock)
            if failed:
                return failed
        return 0

    # --- launches that PyTorch runs ---

    def _aten_step(self, launch: ir.Launch, dims: Sequence[str]) -> Callable[..., None]:
        """Return a function that runs one launch by PyTorch, on tensors that lie in the plan."""
        if launch.kind == "aten":
            args, kwargs, has_out = launch.call
            writes = launch.args[len(launch.args) - self._written(launch):]
            return self._call_step(launch.target, args, kwargs, writes, bool(has_out), dims)
        if launch.kind == "kernel":
            (lowered,) = launch.call
            return self._region_step(launch, lowered, dims)  # type: ignore[arg-type]
        if launch.kind == "gemm":
            x, weight, bias, out = launch.args
            assert out is not None
            given = [x, weight] if bias is None else [x, weight, bias]
            return self._call_step(aten.linear.default, given, {}, (out,), False, dims)
        target, arguments = launch.call
        return self._call_step(target, arguments[0], arguments[1], (launch.args[3],), False, dims)  # type: ignore[index]

    @staticmethod
    def _written(launch: ir.Launch) -> int:
        value = launch.call[0]
        count = 0
        for arg in reversed(launch.args):
            if arg is not None and arg.tensor not in launch.writes:
                break
            count += 1
        return count if value is not None else 0

    def _call_step(
        self, target: Any, args: Any, kwargs: Any, writes: Sequence[ir.Operand | None],
        has_out: bool, dims: Sequence[str],
    ) -> Callable[..., None]:  # fmt: skip
        maker = self._argument_maker((args, kwargs), dims)
        outputs = [None if w is None else self._tensor_maker(w, dims) for w in writes]

        def step(values: tuple[int, ...], execution: Any, arena: Any, named: Any) -> None:
            given, options = maker(values, arena, execution, named)
            results = [None if o is None else o(values, arena, execution, named) for o in outputs]
            if has_out:
                out_target(*given, **options, out=results[0])
                return
            made = target(*given, **options)
            made = (made,) if isinstance(made, torch.Tensor) else made
            for result, value in zip(results, made, strict=True):
                if result is not None:
                    result.copy_(value)

        out_target = _out_variant(target) if has_out else None
        return step

    def _region_step(
        self, launch: ir.Launch, lowered: Lowered, dims: Sequence[str]
    ) -> Callable[..., None]:
        params = lowered.kernel.params
        inputs = [n for n, p in zip(lowered.operands, params, strict=True) if p.role == "in"]
        outputs = [n for n, p in zip(lowered.operands, params, strict=True) if p.role == "out"]
        extracted = extract(outputs, inputs, lowered.kernel.name)
        operands = [a for a, p in zip(launch.args, params, strict=True) if p.role == "in"]
        writes = [a for a, p in zip(launch.args, params, strict=True) if p.role == "out"]
        args = (*operands, *extracted.sizes)
        return self._call_step(extracted.module, args, {}, writes, False, dims)

    def _argument_maker(self, structure: Any, dims: Sequence[str]) -> Callable[..., Any]:
        """Return a function that rebuilds call arguments, tensors and sizes filled in."""

        def build(value: Any) -> Callable[..., Any]:
            if isinstance(value, ir.Operand):
                return self._tensor_maker(value, dims)
            if isinstance(value, Expr):
                evaluate = compile_evaluator([value], dims)
                return lambda values, *_: evaluate(*values)[0]
            if isinstance(value, (list, tuple)):
                parts = [build(v) for v in value]
                return lambda *state: [p(*state) for p in parts]
            if isinstance(value, dict):
                named = {k: build(v) for k, v in value.items()}
                return lambda *state: {k: v(*state) for k, v in named.items()}
            return lambda *_: value

        return build(structure)

    def _tensor_maker(self, operand: ir.Operand, dims: Sequence[str]) -> Callable[..., torch.Tensor]:
        """Return a function that gives the tensor an operand stands for in one execution."""
        tensor = self.assembly.tensors[operand.tensor]
        if tensor.kind != "intermediate":
            window = self.window_maker(operand, dims)

            def outside(values: tuple[int, ...], arena: Any, execution: Any, named: Any) -> torch.Tensor:
                base = named.get(operand.tensor)
                base = self.weights.tensors[operand.tensor] if base is None else base
                return window(values, base)

            return outside
        shape = compile_evaluator(operand.shape, dims)
        strides = compile_evaluator(operand.strides, dims)
        start = compile_evaluator([operand.offset * operand.dtype.itemsize], dims)
        size = operand.dtype.itemsize

        def inside(values: tuple[int, ...], arena: Any, execution: Any, named: Any) -> torch.Tensor:
            slot = self.table.slots[operand.tensor]
            at = execution.table[slot] - execution.base + start(*values)[0]
            flat = arena.tensor[at - at % size :]
            flat = flat[: flat.numel() // size * size].view(operand.dtype)
            return flat.as_strided(shape(*values), strides(*values))

        return inside

    def window_maker(
        self, operand: ir.Operand, dims: Sequence[str]
    ) -> Callable[[tuple[int, ...], torch.Tensor], torch.Tensor]:
        """Return a function (dims, whole tensor) -> the operand's window on it."""
        shape = compile_evaluator(operand.shape, dims)
        strides = compile_evaluator(operand.strides, dims)
        offset = compile_evaluator([operand.offset], dims)

        def window(values: tuple[int, ...], base: torch.Tensor) -> torch.Tensor:
            start = base.storage_offset() + offset(*values)[0]
            return base.as_strided(shape(*values), strides(*values), start)

        return window

    @staticmethod
    def is_dense(operand: ir.Operand) -> bool:
        return operand.offset == 0 and operand.strides == contiguous_strides(operand.shape)


def _out_variant(target: Any) -> Any:
    """Return the overload of an ATen GEMM that writes into a given tensor."""
    packet = target.overloadpacket
    return packet.out
