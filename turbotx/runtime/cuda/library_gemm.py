"""Library GEMM: PyTorch's call of cuBLAS with `out=` in planned memory.

In: a `LibraryGemm`. Out: a function from a run's state to a call, which is valid as long as the
memory of its tensors::

    make_gemm(LibraryGemm(x, weight, bias, out, ...), dims)(state)()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from turbotx.program.executable import LibraryGemm
from turbotx.runtime.aten import make_window
from turbotx.runtime.state import RunState

Call = Callable[[], object]


def make_gemm(gemm: LibraryGemm, dims: Sequence[str]) -> Callable[[RunState], Call]:
    """Return a function that binds x @ weight.t() + bias, 2-d each, to a run's state.

    The bias is added to the float32 sums before rounding, as in PyTorch's linear. float32 follows
    `torch.backends.cuda.matmul`: TF32 only if the user allows it. A following ReLU is fused by the
    library; a GELU is not, since cuBLASLt's is the tanh form with its own rounding.
    """
    x, weight, out = (make_window(w, dims) for w in (gemm.x, gemm.weight, gemm.out))
    bias = None if gemm.bias is None else make_window(gemm.bias, dims)

    def bind(state: RunState) -> Call:
        given, target = x(state), out(state)
        flipped = weight(state).t()
        if bias is None:
            return partial(torch.mm, given, flipped, out=target)
        if gemm.relu:
            add = torch._addmm_activation
            return partial(add, bias(state), given, flipped, use_gelu=False, out=target)
        return partial(torch.addmm, bias(state), given, flipped, out=target)

    return bind
