"""Compile-time properties of GEMMs, attention, its two products, and sequence reductions.

In: nothing; these types are to matrix kernels what `Kernel` is to fused ones. Out: keys of builds;
equal kernels of different layers are built once. For example::

    GemmKernel("gelu")    AttentionKernel(torch.float32, 64, 0.125, causal=False, keys="mask")
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from turbotx.ir.attention_ops import NO_WINDOW

# In the order of `Activation` in epilogue.h.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh")
# Of weights and outputs, as `ttx_pack_weight` and `ttx_linear_quantized` of runtime/cpu take them;
# bytes are two numbers of int4 each.
DTYPE_CODES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4,
}  # fmt: skip
# What stands for a dtype in the name of a kernel.
DTYPE_NAMES = {
    torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "f16",
}  # fmt: skip


@dataclass(frozen=True)
class RowNorm:
    """A norm of rows: kind "layer" or "rms", with eps inside the square root."""

    kind: str
    eps: float


@dataclass(frozen=True)
class GemmKernel:
    """The compile-time properties of a GEMM launch.

    activation: one of ACTIVATIONS.
    gated: the second half of the weight's columns multiplies the activated first half.
    norm, residual_norm: norms applied to the rows of x and of the residual.
    stats: whether it stores statistics of its own rows for those. Launches with any of the last
    three also use `NormOperands`.
    """

    activation: str = "none"
    gated: bool = False
    norm: RowNorm | None = None
    residual_norm: RowNorm | None = None
    stats: bool = False

    @property
    def folds(self) -> bool:
        """Whether a norm is folded into the GEMM: applied to its input or residual, or its
        statistics stored."""
        return self.stats or not self.norm is self.residual_norm is None


@dataclass(frozen=True)
class AttentionKernel:
    """The compile-time properties of an attention launch; see `attention_ops.attention`.

    bias: "none", "boolean", "float32" or "storage" (the dtype of q).
    keys: "all", "mask" or "lengths" (one int64 per batch row).
    window: keys seen before and after the query's position, -1 for no limit.
    blind_nan, blind_mean: a query that sees no key gets NaN, or the mean of all values, instead of
    zeros.
    softcap: 0 for none.
    late: the last query is aligned with the last key.
    sinks: each head has one more float32 score, whose weight goes to no value.
    packed: over sequences on one token axis (`ir.packed_ops`).
    cached: keys or values may lie in a cache's blocks.
    stores: k and v are new rows, which it stores there first, and attends to with the others.
    peaks: the largest magnitude of each output row is stored, by head.
    """

    dtype: torch.dtype
    head_dim: int
    scale: float
    causal: bool
    bias: str = "none"
    keys: str = "all"
    window: tuple[int, int] = NO_WINDOW
    blind_nan: bool = False
    blind_mean: bool = False
    softcap: float = 0.0
    late: bool = False
    sinks: bool = False
    packed: bool = False
    cached: bool = False
    stores: bool = field(default=False, repr=False)  # on a GPU as `cached`
    peaks: bool = field(default=False, repr=False)  # what was tuned goes by the text of the others

    @property
    def name(self) -> str:
        """A name with dtype, head size and masks: "attention_f32_64_causal_key_mask"."""
        kind = DTYPE_NAMES[self.dtype]
        causal = "_late" * self.late + "_causal" * self.causal
        window = "" if self.window == NO_WINDOW else "_window"
        keys = {"all": "", "mask": "_key_mask", "lengths": "_lengths"}[self.keys]
        bias = "" if self.bias == "none" else f"_{self.bias}_bias"
        blind = "_nan" if self.blind_nan else "_mean" if self.blind_mean else ""
        capped = "_capped" if self.softcap else ""
        base = "packed_attention" if self.packed else "attention"
        sinks = "_sinks" * self.sinks
        masks = f"{causal}{window}{keys}{bias}"
        return f"{base}_{kind}_{self.head_dim}{masks}{capped}{sinks}{blind}{'_peaks' * self.peaks}"


@dataclass(frozen=True)
class ProductKernel:
    """The compile-time properties of a product: "scores" = a b^T in float32, "values" = a b in
    dtype.

    dtype: of q, k and v.
    head_dim: the reduced length of scores, the width of values.
    """

    which: str
    dtype: torch.dtype
    head_dim: int

    @property
    def name(self) -> str:
        """A name with product, dtype and head size: "attention_scores_f32_64"."""
        return f"attention_{self.which}_{DTYPE_NAMES[self.dtype]}_{self.head_dim}"


@dataclass(frozen=True)
class SequenceKernel:
    """The compile-time properties of an op on each sequence's tokens (`ir.packed_ops`).

    which: "sum", "max", "first" or "last" token, or "cumsum".
    dtype, out: of the input and of the result.
    """

    which: str
    dtype: torch.dtype
    out: torch.dtype

    @property
    def name(self) -> str:
        """A name with operation and dtype: "sequence_sum_float32"."""
        return f"sequence_{self.which}_{str(self.dtype).removeprefix('torch.')}"
