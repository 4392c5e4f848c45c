"""torch's own samples of every operator that the op table computes.

In: the operators' names in torch's database. Out: every sample within the error rule of the
project (1.5 x eager's error against float64, plus 2 ulp); integers and bools are equal. A few
operators by their kernels' meaning; all of them compiled by the sweep, as in::

    python -m tests.ops.sweep
"""

from __future__ import annotations

import pytest
import torch

from tests.compiled_functions import by_interpreter, compile_function
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.ops.operator_samples import (
    NAMES,
    batches,
    dtypes_of,
    excess,
    find_fault,
    samples_of,
)
from tests.ops.sample_sizes import find_size_faults, pick_samples
from tests.ops.sweep import DTYPES, INTEGER_DTYPES, INTEGERS, record_of, sweep
from turbotx.errors import CaptureError

QUICK = ("add", "where", "softmax", "argmax", "flip", "nn.functional.layer_norm")


@pytest.mark.parametrize("name", QUICK)
def test_meaning_of_a_few(name: str) -> None:
    for batch in batches(samples_of(name, torch.float32), 24):
        try:
            made = compile_function(batch.call, *batch.tensors)
        except CaptureError:
            continue  # the sweep tells which sample it was
        results = iter(made.run(batch.tensors, by_interpreter))
        for sample in batch.samples:
            ours = [next(results).to(own.dtype) for own in sample.eager()]
            assert find_fault(sample, ours) is None


@needs_compiler
def test_a_sweep_of_one_operator() -> None:
    assert record_of(*sweep("sigmoid")) == {
        "samples": {"float32": 3, "bfloat16": 3}, "matching": 6, "refused": {}, "wrong": [],
        "aten": ["aten.sigmoid.default"],  # of a sample without elements
    }  # fmt: skip


@pytest.mark.sweep
@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_compiled_samples(name: str) -> None:
    outcomes, _ = sweep(name, DTYPES if dtypes_of(name) & set(DTYPES) else INTEGER_DTYPES)
    assert outcomes
    assert not [o.wrong for o in outcomes if o.wrong]


@pytest.mark.sweep
@needs_compiler
@pytest.mark.parametrize("name", INTEGERS)
def test_compiled_integer_samples(name: str) -> None:
    outcomes, _ = sweep(name, INTEGER_DTYPES)
    assert not [o.wrong for o in outcomes if o.wrong]


@needs_compiler
@pytest.mark.parametrize("name", ["softmax", "cat", "gather", "nn.functional.group_norm", "amax"])
def test_samples_at_sizes_0_to_3(name: str) -> None:
    assert not find_size_faults(pick_samples(name, 1))


@pytest.mark.sweep
@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_every_operator_at_sizes_0_to_3(name: str) -> None:
    samples = pick_samples(name, 3)
    assert samples and not find_size_faults(samples)


def test_a_wrong_result_is_found() -> None:
    sample = samples_of("sigmoid", torch.float32)[0]
    (eager,), (true,) = sample.eager(), sample.reference()
    assert excess(eager, eager, true) is None
    assert excess(eager * (1 + 1e-5), eager, true) is not None
    assert excess(eager.double(), eager, true) is not None
    assert excess(torch.full_like(eager, torch.nan), eager, true) is not None
