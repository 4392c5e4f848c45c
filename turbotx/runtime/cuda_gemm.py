"""GEMMs of a GPU program: PyTorch's own (cuBLAS), written straight into planned memory.

In: a gemm launch: x by rows at one stride, a weight, perhaps a bias. Out: a function that binds it
to one run's memory, and gives a call with nothing left to look up::

    addmm(bias, x.as_strided((tokens, 768), ...), weight.t(), out=planned)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from turbotx import ir
from turbotx.runtime.aten import AtenSteps
from turbotx.runtime.state import RunState
from turbotx.sizes import ONE, ZERO

Call = Callable[[], object]


def bind_gemm(launch: ir.Launch, steps: AtenSteps) -> Callable[[RunState], Call]:
    """Return a function from a run's state to the call that computes x @ weight.t() + bias.

    The bias is added to the float32 sums before they are rounded, as in PyTorch's linear; float32
    follows `torch.backends.cuda.matmul`, so TF32 is used only where the user allows it.
    """
    x, weight, bias, out, _ = launch.args
    assert x is not None and weight is not None and out is not None
    rows, stride, width = launch.sizes[:3]
    depth = x.shape[-1]
    rows_of_x = steps.tensor(ir.Operand(x.tensor, x.dtype, (rows, depth), (stride, ONE), x.offset))
    rows_of_out = steps.tensor(ir.Operand(out.tensor, out.dtype, (rows, width), (width, ONE), ZERO))
    weights = steps.tensor(weight)
    biases = None if bias is None else steps.tensor(bias)

    def bind(state: RunState) -> Call:
        given, target = rows_of_x(state), rows_of_out(state)
        flipped = weights(state).t()
        if biases is None:
            return partial(torch.mm, given, flipped, out=target)
        return partial(torch.addmm, biases(state), given, flipped, out=target)

    return bind
