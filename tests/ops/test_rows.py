"""Every row of the op table on a fixed sample: what its kernel means, its C++, its Triton.

In: `row_samples`, one call for each row, met by the row itself and not decomposed before. Out:
the kernel's meaning is ATen's result in float64; the printed C++ is as near to it as ATen is; the
printed Triton too, in its interpreter or else by compiling for NVIDIA and AMD.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import turbotx
from tests.kernel_interpreter import interpret
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.ops.operator_samples import excess
from tests.ops.row_samples import Call, call_of, overloads
from turbotx import ir
from turbotx.ir.expr import evaluate
from turbotx.kernels.build import build_library
from turbotx.kernels.cpp.printer import print_kernel
from turbotx.kernels.schedule import Schedule
from turbotx.kernels.triton.compiler import TARGETS, build, kernel_job
from turbotx.kernels.triton.printer import print_triton
from turbotx.runtime.cpu.launch_table import PRELUDE

ROWS = overloads()
call = functools.cache(call_of)
Runner = Callable[[ir.Kernel, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def run(made: Call, runner: Runner, wide: bool = False) -> torch.Tensor:
    """Run a call's kernels one after another; the last one's output is the call's."""
    values: dict[Any, torch.Tensor] = {}
    holders = [n for n in made.fused.region.nodes[0].graph.nodes if n.op == "placeholder"]
    for node, x in zip(holders, made.tensors, strict=True):
        values[node] = x.double() if wide and x.is_floating_point() else x
    for lowered in made.fused.kernels:
        pairs = list(zip(lowered.operands, lowered.kernel.params, strict=True))
        given = {p.name: values[n].contiguous() for n, p in pairs if p.role == "in"}
        results = runner(lowered.kernel, given)
        values |= {n: results[p.name] for n, p in pairs if p.role == "out"}
    return values[made.fused.region.nodes[0]]


def check(made: Call, ours: torch.Tensor) -> None:
    eager, wide = made.eager(), made.eager(wide=True)
    found = excess(ours.to(eager.dtype), eager, wide)
    assert found is None, f"{made.overload}: {found}"


@pytest.mark.parametrize("overload", ROWS)
def test_the_kernel_means_what_aten_computes(overload: str) -> None:
    made = call(overload)
    ours = run(made, lambda kernel, given: interpret(kernel, given, {}), wide=True)
    true = made.eager(wide=True)
    assert ours.shape == true.shape
    torch.testing.assert_close(ours.to(true.dtype), true, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """Every row's kernels as one shared object."""
    texts = [
        print_kernel(lowered.kernel, f"row{k}_{j}")
        for k, overload in enumerate(ROWS)
        for j, lowered in enumerate(call(overload).fused.kernels)
    ]
    units = {f"rows{k}": PRELUDE + "\n".join(texts[k : k + 60]) for k in range(0, len(texts), 60)}
    return build_library(units)[0]


@needs_compiler
def test_the_printed_cpp(library: ctypes.CDLL) -> None:
    for k, overload in enumerate(ROWS):
        made = call(overload)
        numbers = iter(range(len(made.fused.kernels)))

        def launch(
            kernel: ir.Kernel, given: dict[str, torch.Tensor], k: int = k, numbers: Any = numbers
        ) -> dict[str, torch.Tensor]:
            outs = outputs_of(kernel)
            pointers = [(given | outs)[p.name].data_ptr() for p in kernel.params]
            args, sizes = (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * 1)()
            assert getattr(library, f"row{k}_{next(numbers)}")(args, sizes) == 0
            return outs

        check(made, run(made, launch))


def outputs_of(kernel: ir.Kernel) -> dict[str, torch.Tensor]:
    return {
        p.name: torch.zeros([evaluate(e, {}) for e in p.shape], dtype=p.dtype)
        for p in kernel.params
        if p.role == "out"
    }


@pytest.mark.parametrize("overload", ROWS)
def test_the_printed_triton(overload: str) -> None:
    """In the interpreter, where libdevice does not run: those rows are only compiled, below."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from tests.kernels.triton.triton_runner import TritonRunner

    made = call(overload)
    if any("libdevice" in print_triton(x.kernel) for x in made.fused.kernels):
        return
    runner = TritonRunner(Schedule(2, 16))
    check(made, run(made, lambda kernel, given: runner(kernel, given, {})))


def check_compiles(target: str, is_chosen: Callable[[ir.Kernel], bool]) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    assert target in TARGETS
    kernels = {
        x.kernel.digest(): x.kernel
        for overload in ROWS
        for x in call(overload).fused.kernels
        if is_chosen(x.kernel)
    }
    built = build([kernel_job(kernel, target) for kernel in kernels.values()])
    assert len(built) == len(kernels)
    assert all(b.resources.instructions for b in built)


@pytest.mark.triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_printed_triton_compiles(target: str) -> None:
    """The rows that the interpreter leaves out."""
    check_compiles(target, lambda kernel: "libdevice" in print_triton(kernel))


@pytest.mark.triton
@pytest.mark.sweep
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_printed_triton_compiles(target: str) -> None:
    check_compiles(target, lambda kernel: True)


@needs_compiler
def test_places_of_fractional_steps_are_those_of_eager() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.arange(2.1, -2.9, -1.0) + x, torch.arange(0, len(x), 0.7) + x[0]]

    fast = turbotx.optimize(function)
    for ours, eager in zip(fast(torch.zeros(5)), function(torch.zeros(5)), strict=True):
        assert torch.equal(ours, eager)
