"""Activations of a GEMM's sums, in float32, and the gate behind them."""

import triton
import triton.language as tl

from turbotx.kernels.triton.templates.functions import gelu, tanh


@triton.jit
def activate(
    x, gate, ACTIVATION: tl.constexpr, LIGHT_GELU: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    if ACTIVATION == "relu":
        x = tl.where(x > 0.0, x, x * 0.0)  # NaN stays
    elif ACTIVATION == "gelu":
        x = gelu(x) if LIGHT_GELU else 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # x/2 (1 + tanh(y)) = x / (1 + exp(-2 y)), which loses nothing where tanh(y) is near -1.
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION != "none":
        tl.static_assert(False, "no such activation")
    if GATED:
        x = x * gate
    return x
