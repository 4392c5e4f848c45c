"""The library's GEMM: PyTorch's call of cuBLAS, `out=` straight into planned memory.

In: a `LibraryGemm`. Out: a function from a run's state to the call, which can be kept as long as
the memory that it looks at::

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
    """Return a function to the call that computes x @ weight.t() + bias, of two dims each.

    The bias is added to the float32 sums before they are rounded, as in PyTorch's linear; float32
    follows `torch.backends.cuda.matmul`, so TF32 is used only where the user allows it. A ReLU
    behind it is done by the library too (cuBLASLt's GELU is the tanh one, in its own rounding).
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
