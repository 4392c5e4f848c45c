"""Random graphs of elementwise ops, reductions, views and indexing, through the whole pipeline.

In: 5 to 40 random calls over random shapes and dtypes. Out: what the kernels mean is what eager
means in float64, and the printed C++ and Triton are as near to it as eager is; for example::

    x -> softmax(1) -> permute -> + y -> reshape -> layer_norm -> cat -> sum(0)
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence
from dataclasses import replace
from math import inf, isnan
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import turbotx
from tests.compiled_functions import by_interpreter, compile_function
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.random_programs import (
    Program,
    Step,
    Values,
    draw_inputs,
    grow,
    inputs,
    steps,
    widen,
    write_program,
)
from turbotx.kernels.schedule import Schedule
from turbotx.ops.builder import Element, KernelBuilder

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# A capture takes a second: a failing example is shown as it was drawn, not made smaller.
patient: dict[str, Any] = {
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": list(HealthCheck),
}


def close(ours: torch.Tensor, true: torch.Tensor) -> bool:
    return torch.allclose(ours.double(), true.double(), rtol=1e-9, atol=1e-9)


fold_in_their_dtypes = vars(KernelBuilder)["_fold_constants"]


def fold_in_float64(builder: KernelBuilder, op: str, args: tuple[Element, ...]) -> Element | None:
    """What is known while lowering is folded in its dtype: each step of (0 + 0.1).sqrt() rounds to
    float32, as eager does. The interpreter rounds nothing, so that here folding may not either."""
    wide = [replace(a, dtype=torch.float64) if a.is_float else a for a in args]
    folded = fold_in_their_dtypes(builder, op, tuple(wide))
    if folded is None or folded.value is None or not folded.is_float:
        return folded
    return builder.constant(folded.value, args[-1].dtype)


def check_meaning(drawn: list[Step], given_inputs: Values, outputs: int) -> None:
    """What jumps at a value that another rounding puts on the other side is nobody's fault. Kernels
    round to half precision nowhere, as the graph in float64 does not."""
    program = write_program(drawn, outputs, given_inputs)
    if not program.calls:
        return
    exact = {"_fold_constants": fold_in_float64, "rounded": lambda builder, x, dtype: x}
    with mock.patch.multiple(KernelBuilder, **exact):
        made = compile_function(program, *given_inputs)
    wide = widen(given_inputs)
    expected, noisy = program(*wide), program.run(wide, noise=1e-13)
    for ours, true, other in zip(made.run(wide, by_interpreter), expected, noisy, strict=True):
        assert ours.shape == true.shape
        assert close(ours, true) or not close(other, true)


# The variance of one number is 0, and 0.1 more and its root are folded.
VARIANCE_OF_ONE: list[Step] = [("unsqueeze", 2, 0, 1, 0), ("reduce", 0, 1, 1, 5)]


@settings(max_examples=12, **patient)
@given(steps, inputs(), st.integers(1, 3))
@example(VARIANCE_OF_ONE, draw_inputs(random.Random(0), (torch.float32,), 7), 1)
def test_kernels_mean_what_the_graph_means(
    drawn: list[Step], given_inputs: Values, outputs: int
) -> None:
    check_meaning(drawn, given_inputs, outputs)


@pytest.mark.sweep
@settings(max_examples=200, **patient)
@given(steps, inputs(), st.integers(1, 3))
def test_many_kernels_mean_what_the_graph_means(
    drawn: list[Step], given_inputs: Values, outputs: int
) -> None:
    check_meaning(drawn, given_inputs, outputs)


def check_results(program: Program, given: Values, results: Sequence[torch.Tensor]) -> None:
    """Errors at most a few times those of eager, or of float64 that rounds as the dtypes do: a norm
    of equal numbers, say, magnifies a rounding error that eager happens not to make. Where eager
    gives NaN (what underflows is divided by itself), it is no judge."""
    wide = widen(given)
    eager, true = program(*given), program(*wide)
    rounded = [program.run(wide, noise=True) for _ in range(8)]
    for k, ours in enumerate(results):
        assert (ours.shape, ours.dtype) == (eager[k].shape, eager[k].dtype)
        if not ours.is_floating_point():
            assert torch.equal(ours, eager[k])
            continue
        allowed = 8 * torch.finfo(ours.dtype).eps * (1 + float(true[k].abs().max()))
        far = [float((other[k].double() - true[k]).abs().max()) for other in (eager, *rounded)]
        allowed = max(allowed, *(4 * (inf if isnan(distance) else distance) for distance in far))
        error = float((ours.double() - true[k]).abs().max())
        assert error <= allowed, f"result {k}: an error of {error}, allowed are {allowed}"


def check_compiled(*drawn: tuple[list[Step], Values]) -> None:
    """Programs side by side in one capture: at the sizes of the first call, and at twice those,
    where eager takes them too."""
    written = [(write_program(chosen, 2, first, jumps=False), first) for chosen, first in drawn]
    programs = [program for program, _ in written if program.calls]
    first = [values for program, values in written if program.calls]
    if not programs:
        return

    def run_each(every: list[Values]) -> list[Values]:
        return [program(*values) for program, values in zip(programs, every, strict=True)]

    fast = turbotx.optimize(run_each)
    larger = list(map(_grow_if_taken, programs, first))
    for every in (first, larger) if any(map(operator.is_not, first, larger)) else (first,):
        for program, values, results in zip(programs, every, fast(every), strict=True):
            check_results(program, values, results)


def _grow_if_taken(program: Program, values: Values) -> Values:
    larger = grow(values)
    try:
        program(*larger)
    except RuntimeError:
        return values
    return larger


@needs_compiler
@settings(max_examples=4, **patient)
@given(steps, inputs(FLOATS, 33))
def test_compiled_programs(drawn: list[Step], given_inputs: Values) -> None:
    check_compiled((drawn, given_inputs))


def check_triton(drawn: list[Step], given_inputs: Values) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from tests.kernels.triton.triton_runner import TritonRunner

    program = write_program(drawn, 2, given_inputs, jumps=False, largest=500)
    if not program.calls:
        return
    made = compile_function(program, *given_inputs)
    runner = TritonRunner(Schedule(2, 16))
    results = made.run([x.contiguous() for x in given_inputs], runner)
    check_results(program, given_inputs, results)


@settings(max_examples=3, **patient)
@given(steps, inputs(FLOATS, 5))
def test_triton_programs(drawn: list[Step], given_inputs: Values) -> None:
    check_triton(drawn, given_inputs)


@pytest.mark.sweep
@settings(max_examples=60, **patient)
@given(steps, inputs(FLOATS, 5))
def test_many_triton_programs(drawn: list[Step], given_inputs: Values) -> None:
    check_triton(drawn, given_inputs)
