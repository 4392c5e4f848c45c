"""Ops that deliberately have no row: why ATen runs them, and which layouts they accept.

In: a call, or its op. Out: the reason shown in the report, and whether it accepts any layout; an op
that is not known to accept any gets its arguments laid out as in eager::

    why_outside(topk)  ->  "orders a row by comparisons: ATen's own sort does that"
    takes_any_layout(aten.lstm.input)  ->  False
"""

from __future__ import annotations

from typing import Any

from torch import fx

from turbotx.ir.fx_nodes import dtype, is_tensor
from turbotx.ir.subgraphs import WithGraphs
from turbotx.ops.table import OPS, is_stored

_ORDERS = "orders a row by comparisons: ATen's own sort does that"
_WRITES = "writes at places that are known only when it runs, where two may be one"
_COUNTS = "has a result whose size depends on values, or counts by value"
_WINDOWS = "is a product over windows: the vendor's library does that"
_STEPS = "is a recurrent layer, whose steps run one after another: the vendor's library does that"
_CARRIES = "carries more than one number along a row, which a scan does not"

# By name of the op, for all of its overloads.
REASONS = {
    **dict.fromkeys(("topk", "sort", "argsort", "kthvalue", "median", "mode", "msort"), _ORDERS),
    **dict.fromkeys(
        ("index_put", "scatter", "scatter_add", "scatter_reduce", "index_add", "masked_scatter"),
        _WRITES,
    ),
    **dict.fromkeys(("nonzero", "_unique2", "bincount", "histc", "masked_select"), _COUNTS),
    **dict.fromkeys(("convolution", "avg_pool2d", "max_pool2d_with_indices", "grid_sampler_2d",
                     "upsample_bicubic2d", "upsample_bilinear2d"), _WINDOWS),
    **dict.fromkeys(("cummax", "cummin", "logcumsumexp"), _CARRIES),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _STEPS),
    **dict.fromkeys(("_fft_c2c", "_fft_r2c", "_fft_c2r"), "is a Fourier transform"),
    "view_as_real": "shows complex numbers, which no kernel computes",
}  # fmt: skip


def why_outside(node: fx.Node) -> str:
    """Return why ATen runs a call, for reports."""
    target: Any = node.target
    if isinstance(target, WithGraphs):
        return f"{target} is given graphs, which PyTorch runs"
    name = getattr(getattr(target, "overloadpacket", None), "__name__", "")
    if name in REASONS:
        return f"{target} {REASONS[name]}"
    if target not in OPS:
        return f"{target} has no row in the op table"
    odd = [n for n in (node, *node.all_input_nodes) if is_tensor(n) and not is_stored(n, target)]
    if odd:
        found = dtype(odd[0])
        kind = "complex" if found.is_complex else str(found).removeprefix("torch.")
        return f"{target} works on {kind} numbers, which kernels do not"
    return f"{target} takes a float made of sizes in a way that kernels do not compute"


# Ops that respect strides: those in `REASONS`, and products. Others may read raw memory
# (`as_strided`, recurrent layers, custom ops), require dense rows (`view_as_complex`) or draw
# random numbers in memory order.
_BY_STRIDES = {name for name, why in REASONS.items() if why != _STEPS} - {"view_as_real"} | {
    "linear", "mm", "bmm", "matmul", "addmm", "baddbmm", "scaled_dot_product_attention",
    "_embedding_bag", "_cdist_forward", "linalg_vector_norm", "searchsorted", "bucketize",
}  # fmt: skip


def takes_any_layout(target: Any) -> bool:
    """Return whether an op's result does not depend on how its arguments are laid out."""
    packet = getattr(target, "overloadpacket", None)
    name, space = getattr(packet, "__name__", ""), getattr(target, "namespace", "aten")
    return space == "turbotx" or (space == "aten" and name in _BY_STRIDES)
