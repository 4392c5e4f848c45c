"""The library's GEMM: PyTorch's call of cuBLAS, `out=` straight into planned memory.

In: how to look at its operands in a run. Out: a function from a run's state to the call, which
can be kept as long as the memory that it looks at::

    make_gemm(rows_of_x, weight, bias, rows_of_out, relu=False)(state)()
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from turbotx.runtime.state import RunState

Call = Callable[[], object]
Look = Callable[[RunState], torch.Tensor]


def make_gemm(
    x: Look, weight: Look, bias: Look | None, out: Look, relu: bool
) -> Callable[[RunState], Call]:
    """Return a function to the call that computes x @ weight.t() + bias, of two dims each.

    The bias is added to the float32 sums before they are rounded, as in PyTorch's linear; float32
    follows `torch.backends.cuda.matmul`, so TF32 is used only where the user allows it. A ReLU
    behind it is done by the library too (cuBLASLt's GELU is the tanh one, in its own rounding).
    """

    def bind(state: RunState) -> Call:
        given, target = x(state), out(state)
        flipped = weight(state).t()
        if bias is None:
            return partial(torch.mm, given, flipped, out=target)
        if relu:
            add = torch._addmm_activation
            return partial(add, bias(state), given, flipped, use_gelu=False, out=target)
        return partial(torch.addmm, bias(state), given, flipped, out=target)

    return bind
