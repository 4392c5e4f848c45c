"""What a launch has to move: elements that are read more than once count once.

In: attention with a bias by distance. Out: the bytes of q, k, v and of one number a diagonal.
"""

from __future__ import annotations

import torch

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.passes.test_attention import Attend
from tests.passes.test_diagonals import BY_DISTANCE, adding


@needs_compiler
def test_a_diagonal_counts_once() -> None:
    module = Attend(adding(BY_DISTANCE["ALiBi"])).eval()
    report = turbotx.explain(module, torch.randn(2, 33, 16))
    (kernel,) = (k for k in report.kernels if k.name.startswith("attention"))
    assert kernel.read_nbytes == 4 * (3 * 2 * 33 * 4 * 8 + 4 * (2 * 33 - 1))
