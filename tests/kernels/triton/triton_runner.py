"""Runs printed Triton in Triton's interpreter, on the CPU, in this process.

In: a kernel, one tensor per input param and the dims. Out: the tensors that it stores, so that
`tests.compiled_functions` can run whole functions with it, for example::

    compile_function(f, x).run((x,), TritonRunner())
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.kernel_interpreter import CheckFailed
from turbotx import ir
from turbotx.ir.expr import evaluate
from turbotx.kernels.schedule import Schedule, choose_schedule, grid
from turbotx.kernels.triton.compiler import kernel_job

FP8 = torch.float8_e4m3fn


@contextmanager
def interpreting() -> Iterator[None]:
    """Let device functions, Triton's own among them, be called by interpreted kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            JITFunction, "__call__", lambda self, *a, **k: InterpretedFunction(self.fn)(*a, **k)
        )
        original = interpreter._patch_lang_tensor

        def patch_tensor(tensor: Any, *scope: Any) -> None:
            # Triton 3.6 converts an array of one element to an int, which NumPy 2.4 refuses.
            original(tensor, *scope)
            tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])

        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _multiply)
        patch.setattr(interpreter, "_convert_float", _convert_float)
        patch.setattr(interpreter.InterpreterBuilder, "create_si_to_fp", _from_integers)
        patch.setattr(interpreter.ReduceOps, "generic_reduce", _reduce_in_halves)
        with np.errstate(all="ignore"):  # infinities and NaN are as ordinary as on a GPU
            yield


_own_conversion: Any = interpreter._convert_float  # private API


def _convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """A conversion of floats, to and from fp8 as GPUs do it.

    The interpreter's own rounds halves away from zero and not to even, loses the carry where a
    rounded mantissa overflows, cuts subnormals off, and takes NaN for a number.
    """
    if target.name == "fp8e4nv" and source.name == "fp32":
        return torch.from_numpy(np.ascontiguousarray(values)).to(FP8).view(torch.uint8).numpy()
    if source.name == "fp8e4nv":
        floats = torch.from_numpy(np.ascontiguousarray(values)).view(FP8).float().numpy()
        if target.name == "fp32":
            return floats.view(np.uint32)
        values, source = floats, tl.float32
    return _own_conversion(values, source, target, rounding)


def _from_integers(self: Any, values: Any, target: Any) -> Any:
    """Integers as floats; the interpreter's own makes bfloat16's bits of the number itself."""
    if target.scalar.name != "bf16":
        return self.cast_impl(values, target)
    floats = interpreter.TensorHandle(values.data.astype(np.float32), tl.float32)
    return self.cast_impl(floats, target)


def _multiply(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """A product of tiles; the interpreter's own takes bfloat16's bits for whole numbers."""
    parts = []
    for handle in (a, b):
        bits = handle.data
        if handle.dtype.scalar.name == "bf16":
            bits = (bits.astype(np.uint32) << 16).view(np.float32)
        if handle.dtype.scalar.name == "fp8e4nv":
            bits = torch.from_numpy(np.ascontiguousarray(bits)).view(FP8).float().numpy()
        parts.append(bits.astype(d.data.dtype))
    return interpreter.TensorHandle(np.matmul(*parts) + d.data, d.dtype.scalar)


def _reduce_in_halves(self: Any, given: Any) -> list[Any]:
    """A reduction by a combine function over all elements at once, neighbours first, as a GPU does.

    The interpreter's own calls the function for one pair of elements after another.
    """
    axis = self.axis or 0
    kinds = [x.dtype for x in given]
    values = [np.moveaxis(x.handle.data, axis, -1) for x in given]
    if self.axis is None:
        values = [x.handle.data.reshape(-1) for x in given]
    while values[0].shape[-1] > 1:  # a power of two, as every tile
        sides = [np.ascontiguousarray(v[..., k::2]) for k in (0, 1) for v in values]
        pairs = zip(sides, [*kinds, *kinds], strict=True)
        made = self.combine_fn.fn(*(self.to_tensor(v, kind) for v, kind in pairs))
        values = [x.handle.data for x in (made if isinstance(made, tuple) else (made,))]
    made = [v[..., 0] for v in values]
    if self.keep_dims:
        rank = given[0].handle.data.ndim
        made = [v.reshape((1,) * rank) if self.axis is None else np.expand_dims(v, axis)
                for v in made]  # fmt: skip
    return [self.to_tensor(v if v.shape else v.item(), k) for v, k in zip(made, kinds, strict=True)]


def load_function(source: str, name: str) -> Callable[..., Any]:
    """Import printed source; Triton reads it back from its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "printed.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("printed", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        return InterpretedFunction(kernel.fn)


class TritonRunner:
    """Runs kernels at the schedule that they would have, or at a given one, whose tile a program
    moves along reduced rows that are longer."""

    def __init__(self, schedule: Schedule | None = None) -> None:
        self.schedule = schedule

    def __call__(
        self, kernel: ir.Kernel, given: dict[str, torch.Tensor], dims: dict[str, int]
    ) -> dict[str, torch.Tensor]:
        schedule = self.schedule or choose_schedule(kernel, dims)
        row = prod(evaluate(a.extent, dims) for a in kernel.columns)
        schedule = replace(schedule, looped=schedule.looped or row > schedule.cols)
        job = kernel_job(kernel, "sm_90", schedule)
        made: dict[str, torch.Tensor] = {}
        for p in kernel.params:
            if p.role == "out":
                made[p.name] = torch.zeros([evaluate(e, dims) for e in p.shape], dtype=p.dtype)
        args: list[Any] = [(given | made)[p.name] for p in kernel.params]
        status = torch.zeros(sum(isinstance(s, ir.Check) for s in kernel.body), dtype=torch.int32)
        if any(name == "status_ptr" for name, _ in job.signature):
            args.append(status)
        args += [dims[n] for n in kernel.sizes]
        programs = grid(kernel, schedule, dims)
        if 0 not in programs:
            with interpreting():
                load_function(job.source, kernel.name)[programs](*args, **dict(job.constexprs))
        if status.any():
            raise CheckFailed(f"{kernel.name}: check {status.max().item()}")
        return made
