"""Row peaks: the largest magnitudes of a row's parts, stored by the rows' producer, read by a GEMM.

They are float32 bits without the sign, int32 (rows, parts): in this order NaN is above infinity,
and infinity above all numbers. Scales and rounding equal those of ir/quantized_ops.py bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def leave_peaks(
    out, peaks_ptr, row, row_ok, column_ok, part, PARTS, MASKED: tl.constexpr
):  # fmt: skip
    """That of one part of each row."""
    bits = out.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if MASKED:
        bits = tl.where(column_ok, bits, 0)
    tl.store(
        peaks_ptr + row.to(tl.int64) * PARTS + part, tl.max(bits, 1, keep_dims=True), mask=row_ok
    )


@triton.jit
def merge_peaks(
    peaks_ptr, m, m_ok, M_TILE: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """What each row is multiplied by to be quantised, and its scale."""
    peak = tl.zeros((M_TILE, 1), tl.int32)
    for first in range(0, PARTS, STEP):
        part = first + tl.arange(0, STEP)[None, :]
        at = peaks_ptr + m.to(tl.int64) * PARTS + part
        bits = tl.load(at, mask=m_ok & (part < PARTS), other=0)
        peak = tl.maximum(peak, tl.max(bits, 1, keep_dims=True))
    finite = peak < 0x7F800000
    # 2^-100: rows of smaller numbers are quantised as if it were one.
    largest = tl.maximum(peak.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    scale = tl.div_rn(largest, LEVELS)
    inverse = tl.where(finite, tl.div_rn(1.0, scale), 0.0)
    scale = tl.where(finite, scale, float("nan"))
    return inverse, scale


@triton.jit
def quantize(x, inverse, KIND: tl.constexpr):
    """Rounded by what float32 has room for above 2^23, since conversions of floats are slow."""
    scaled = x.to(tl.float32) * inverse
    if KIND == "int8":
        # The maximum keeps product and sum apart, which one rounding of both would not be equal to;
        # it changes NaN alone, in a row whose scale is NaN.
        scaled = tl.maximum(scaled, -128.0)
        narrow = (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        narrow = scaled.to(tl.float8e4nv)
    return narrow
