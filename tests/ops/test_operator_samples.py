"""torch's own samples of every operator that the op table computes, as compiled C++.

In: the operators' names in torch's database. Out: every sample within the error rule of the
project (1.5 x eager's error against float64, plus 2 ulp); integers and bools are equal. A sample
that tracing itself refuses is counted out by its reason in REFUSED, for example::

    gather with an index of dtype uint8: eager takes it where it is empty, tracing never does
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.compiled_functions import Compilation, CppRunner, by_interpreter, compile_function
from tests.kernel_interpreter import CheckFailed
from tests.kernels.cpp_probe import needs_compiler
from tests.ops.operator_samples import Batch, batches, dtypes_of, excess, flat_results, reference
from turbotx.errors import CaptureError

SWEEP = pytest.mark.skipif(
    "TURBOTX_SWEEP" not in os.environ, reason="takes many minutes: set TURBOTX_SWEEP=1 to run it"
)

QUICK = ("add", "where", "softmax", "argmax", "flip", "nn.functional.layer_norm")
NAMES = Path(__file__).with_name("operators.txt").read_text().split()
# Substrings of what tracing with symbolic sizes says about samples that it cannot take.
REFUSED = (
    "Attempting to broadcast",  # sizes of 1 beside larger ones that are aligned from the right
    "Number of dimensions of tensors must match",  # cat of the old empty (0,) tensor
    "Expected dtype int32/int64 for index",  # an index of uint8, empty
    "dynamic_shapes",  # no tensor argument
    "data-dependent",
    "Could not guard",
)
INTEGERS = [
    *("add", "sub", "mul", "where", "clamp", "cat", "floor_divide", "remainder", "bitwise_and"),
    *("sum", "amax", "argmax", "eq"),
]


def compile_batch(batch: Batch) -> list[tuple[Batch, Compilation]]:
    """Compile a batch; where tracing refuses it, its halves, down to the samples to leave out."""
    try:
        return [(batch, compile_function(batch.call, *batch.tensors))]
    except CaptureError as error:
        if len(batch.samples) > 1:
            return [made for half in batch.halves() for made in compile_batch(half)]
        if not any(reason in str(error) for reason in REFUSED):
            raise
        return []


def failures(batch: Batch, made: Compilation, runner: object) -> list[str]:
    eager = flat_results(batch.call(*batch.tensors))
    try:
        ours = flat_results(made.run(batch.tensors, runner))  # type: ignore[arg-type]
    except CheckFailed as error:
        return [f"{batch.name} {batch.dtype}: {error}"]
    wide = reference(batch, eager)
    wrong = []
    for k, (mine, own, true) in enumerate(zip(ours, eager, wide, strict=True)):
        found = excess(mine.to(own.dtype), own, true)
        if found is not None:
            wrong.append(f"{batch.name} {batch.dtype}, result {k}: {found}")
    return wrong


def check(names: list[str], dtypes: list[torch.dtype], compiled: bool) -> None:
    jobs = [
        job
        for name in names
        for dtype in dtypes
        if dtype in dtypes_of(name)
        for batch in batches(name, dtype)
        for job in compile_batch(batch)
    ]
    runner = CppRunner(made for _, made in jobs) if compiled else by_interpreter
    wrong = [line for batch, made in jobs for line in failures(batch, made, runner)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", QUICK)
def test_meaning_of_a_few(name: str) -> None:
    check([name], [torch.float32], compiled=False)


@pytest.mark.slow
@SWEEP
@needs_compiler
@pytest.mark.parametrize("begin", range(0, len(NAMES), 12), ids=lambda k: NAMES[k])
def test_compiled_samples(begin: int) -> None:
    check(NAMES[begin : begin + 12], [torch.float32, torch.bfloat16], compiled=True)


@pytest.mark.slow
@SWEEP
@needs_compiler
def test_compiled_integer_samples() -> None:
    check(INTEGERS, [torch.int64, torch.int32, torch.uint8, torch.bool], compiled=True)


def test_a_wrong_result_is_found() -> None:
    (batch,) = batches("sigmoid", torch.float32)
    eager = flat_results(batch.call(*batch.tensors))
    true = reference(batch, eager)
    assert excess(eager[0], eager[0], true[0]) is None
    assert excess(eager[0] * (1 + 1e-5), eager[0], true[0]) is not None
    assert excess(eager[0].double(), eager[0], true[0]) is not None
    assert excess(torch.full_like(eager[0], torch.nan), eager[0], true[0]) is not None
