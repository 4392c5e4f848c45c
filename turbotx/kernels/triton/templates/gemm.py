"""A GEMM with everything around it: normalised input, epilogue, row statistics.

    out = activation(norm(x) w^T + bias) [* the same of the second half of w] + [norm of] residual

A norm is folded: LN(x) W = rstd * (x (gamma W) - mean * sums) + beta W + bias, where sums are those
of gamma W over k. float32 subtracts the mean from x instead. Statistics merge after Chan, Golub &
LeVeque 1979.
"""

import triton
import triton.language as tl

from turbotx.kernels.triton.templates.activation import activate
from turbotx.kernels.triton.templates.experts import find_expert_tile
from turbotx.kernels.triton.templates.peaks import leave_peaks, merge_peaks, quantize
from turbotx.kernels.triton.templates.split_sums import add_parts, leave_part
from turbotx.kernels.triton.templates.statistics import (
    load_statistics,
    merge_in_steps,
    merge_loaded,
)
from turbotx.kernels.triton.templates.weights import load_int4

N = tl.constexpr(None)  # number of outputs; K: of inputs; STORED: dtype of the outputs
K = tl.constexpr(None)
STORED = tl.constexpr(None)
NARROW = tl.constexpr(None)  # scaled x and weight of kind "int8" or "fp8", or "none"
LEVELS = tl.constexpr(None)  # the largest value of that kind
QUANTIZES = tl.constexpr(None)  # x is float and is quantized as it is loaded
WIDENED = tl.constexpr(None)  # fp8 is converted to float16 for the product, with float32 sums
IMPRECISE = tl.constexpr(None)  # otherwise the most fp8 products summed with reduced precision
UNPACKED = tl.constexpr(None)  # only the weight is int8, converted to STORED as it is loaded
GROUP_SIZE = tl.constexpr(None)  # int4: inputs per scale; 0: not int4
GROUPS = tl.constexpr(None)
SHIFTED = tl.constexpr(None)  # behind each scale is an offset
SUMS = tl.constexpr(None)  # the dtype of the sums over k: int32 of int8, else float32
PRECISION = tl.constexpr(None)  # "ieee" or "tf32" for float32, or None
N_TILES = tl.constexpr(None)
N_MASKED = tl.constexpr(None)  # whether the last tile of outputs is partial; K_MASKED: of k
K_MASKED = tl.constexpr(None)
SPLITS = tl.constexpr(None)  # split-K parts
STEPS = tl.constexpr(None)  # steps of K_TILE over all of k
UNROLLED = tl.constexpr(None)  # whether all partial sums are loaded at once
FLIPPED = tl.constexpr(None)  # the weight is stored (k, n)
EXPERTS = tl.constexpr(None)  # number of experts, each with its own weight; 0: one weight
EXPERT_SLOTS = tl.constexpr(None)  # EXPERTS rounded up to a power of two
EXPERT_STEP = tl.constexpr(None)  # elements from one weight to the next
GATED = tl.constexpr(None)  # the weight has 2 n rows; the second half multiplies the first
HAS_BIAS = tl.constexpr(None)
ACTIVATION = tl.constexpr(None)  # name, or "none"
LIGHT_GELU = tl.constexpr(None)  # GELU accurate to 16 bits
SCALED = tl.constexpr(None)  # sums are multiplied by a scale per column
HAS_RESIDUAL = tl.constexpr(None)
HAS_STATS = tl.constexpr(None)  # whether to store statistics of the output's rows
HAS_PEAKS = tl.constexpr(None)  # or the rows' largest magnitudes
LATE = tl.constexpr(None)  # whether the epilogue's operands are loaded before the sums
# The norm of x and the residual, "none", "layer" or "rms"; whether their statistics are asked for
# early and merged late; how many a row has, of how many columns, how many are merged at a time.
X_NORM = tl.constexpr(None)
X_EPS = tl.constexpr(None)
X_WAITS = tl.constexpr(None)
X_PARTS = tl.constexpr(None)
X_TILE = tl.constexpr(None)
X_STEP = tl.constexpr(None)
CENTERED = tl.constexpr(None)  # the mean is subtracted from x instead of from the sums
RESIDUAL_NORM = tl.constexpr(None)
RESIDUAL_EPS = tl.constexpr(None)
RESIDUAL_WAITS = tl.constexpr(None)
RESIDUAL_PARTS = tl.constexpr(None)
RESIDUAL_TILE = tl.constexpr(None)
RESIDUAL_STEP = tl.constexpr(None)

# Tiles of rows that share a turn through the weight, so that it is read from memory once.
GROUP = tl.constexpr(8)


@triton.jit
def find_tile(tokens, M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr):
    # Programs of a few tiles of tokens go through the weight together.
    m_tiles = tl.cdiv(tokens, M_TILE)
    group = tl.program_id(0) // (GROUP * N_TILES) * GROUP
    height = tl.minimum(m_tiles - group, GROUP)
    place = tl.program_id(0) % (GROUP * N_TILES)
    m_tile = group
    n_tile = place
    if height > 1:
        # Exact below 2**20; a division of integers is a call, which spills registers.
        n_tile = ((place.to(tl.float32) + 0.5) / height.to(tl.float32)).to(tl.int32)
        m_tile = group + place - n_tile * height
    m = m_tile * M_TILE + tl.arange(0, M_TILE)[:, None]
    n = n_tile * N_TILE + tl.arange(0, N_TILE)[None, :]
    m_ok = m < tokens
    n_ok = n < N if N_MASKED else True
    begin = tl.program_id(1) * STEPS // SPLITS * K_TILE if SPLITS > 1 else 0
    end = (tl.program_id(1) + 1) * STEPS // SPLITS * K_TILE if SPLITS > 1 else K
    return m_tile, n_tile, m, n, m_ok, n_ok, begin, end


@triton.jit
def begin_reading():
    """From here on it reads what other kernels have written."""


@triton.jit
def find_place(
    w_ptr, ends_ptr, status_ptr, tokens,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    if EXPERTS > 0:
        begin_reading()
        expert, n_tile, m, n, m_ok, n_ok, end = find_expert_tile(
            ends_ptr, status_ptr, tokens, EXPERTS, EXPERT_SLOTS, N, K, N_MASKED, M_TILE, N_TILE
        )
        begin = 0
        w_ptr += expert.to(tl.int64) * EXPERT_STEP
    else:
        m_tile, n_tile, m, n, m_ok, n_ok, begin, end = find_tile(tokens, M_TILE, N_TILE, K_TILE)
        begin_reading()
    return w_ptr, n_tile, m, n, m_ok, n_ok, begin, end


@triton.jit
def begin_asking():
    """What is done to the sums asks for its operands before they are made."""


# --- the sums over k ---


@triton.jit
def load_weight(
    w_ptr, w_row, scales_ptr, start, k, n_tile, n, n_ok, FIRST: tl.constexpr,
    N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    if not FLIPPED:
        down = n_tile * N_TILE + tl.arange(0, N_TILE)[:, None]
        down_ok = down < N if N_MASKED else True
    if GROUP_SIZE > 0:
        w = load_int4(
            w_ptr, w_row, scales_ptr, start, down + FIRST, down_ok, STORED, GROUP_SIZE, GROUPS,
            SHIFTED, K_MASKED, N_TILE, K_TILE,
        )  # fmt: skip
        w = tl.trans(w)
    elif FLIPPED:
        k_down = start + tl.arange(0, K_TILE)[:, None]
        ok = n_ok & (k_down < K) if K_MASKED else n_ok
        w = tl.load(w_ptr + k_down.to(tl.int64) * w_row + n + FIRST, mask=ok, other=0.0)
    else:
        ok = down_ok & (k < K) if K_MASKED else down_ok
        w = tl.trans(tl.load(w_ptr + (down + FIRST).to(tl.int64) * w_row + k, mask=ok, other=0.0))
    if UNPACKED:
        w = w.to(STORED)
    return w


@triton.jit
def merge_x(x_stats_ptr, x_scale_ptr, m, m_ok, tokens, M_TILE: tl.constexpr):
    if QUANTIZES:  # the mean is what rows are multiplied by
        mean, rstd = merge_peaks(x_scale_ptr, m, m_ok, M_TILE, X_PARTS, X_STEP, LEVELS)
    elif NARROW != "none":
        mean = 0.0
        rstd = tl.load(x_scale_ptr + m, mask=m_ok, other=0.0)
    elif X_NORM == "none":
        mean = 0.0
        rstd = 1.0
    else:
        mean, rstd = merge_in_steps(
            x_stats_ptr, m, m_ok, tokens, M_TILE, X_PARTS, X_STEP, K, X_TILE, X_EPS,
            X_NORM == "rms",
        )  # fmt: skip
    return mean, rstd


@triton.jit
def add_product(x, w, sums):
    if NARROW == "int8":
        sums = tl.dot(x, w, sums, out_dtype=tl.int32)
    elif WIDENED:
        sums = tl.dot(x.to(tl.float16), w.to(tl.float16), sums)
    elif NARROW == "fp8":
        sums = tl.dot(x, w, sums, max_num_imprecise_acc=IMPRECISE)
    else:
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
    return sums


@triton.jit
def multiply(
    x_ptr, x_row, x_mean, w_ptr, w_row, scales_ptr, m, m_ok, n_tile, n, n_ok, begin, end,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """The sums over k."""
    sums = tl.zeros((M_TILE, N_TILE), SUMS)
    if GATED:
        gate = tl.zeros((M_TILE, N_TILE), SUMS)
    else:
        gate = 0.0
    for start in range(begin, end, K_TILE):
        k = start + tl.arange(0, K_TILE)[None, :]
        x_ok = m_ok & (k < K) if K_MASKED else m_ok
        w = load_weight(w_ptr, w_row, scales_ptr, start, k, n_tile, n, n_ok, 0, N_TILE, K_TILE)
        # Behind the weight, which comes from farther away.
        x = tl.load(x_ptr + m.to(tl.int64) * x_row + k, mask=x_ok, other=0.0)
        if CENTERED:
            # A masked x would be -mean: the weight is zero there.
            x = x - x_mean
        if QUANTIZES:
            x = quantize(x, x_mean, NARROW)
        sums = add_product(x, w, sums)
        if GATED:
            gate_w = load_weight(
                w_ptr, w_row, scales_ptr, start, k, n_tile, n, n_ok, N, N_TILE, K_TILE
            )
            gate = add_product(x, gate_w, gate)
    return sums, gate


# --- what becomes of them, in float32 ---


@triton.jit
def load_column(ptr, n, ok, FIRST: tl.constexpr):
    return tl.load(ptr + n + FIRST, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_columns(scales_ptr, sums_ptr, bias_ptr, n, ok, FIRST: tl.constexpr):
    scales = load_column(scales_ptr, n, ok, FIRST) if SCALED or NARROW != "none" else 1.0
    w_sums = load_column(sums_ptr, n, ok, FIRST) if X_NORM == "layer" and not CENTERED else 0.0
    bias = load_column(bias_ptr, n, ok, FIRST) if HAS_BIAS else 0.0
    return scales, w_sums, bias


# scales, w_sums and bias are values where LATE, and pointers to them elsewhere.
@triton.jit
def apply_columns(sums, scales, w_sums, bias, n, ok, x_mean, x_rstd, FIRST: tl.constexpr):
    if NARROW != "none":
        factor = scales if LATE else load_column(scales, n, ok, FIRST)
        sums = sums.to(tl.float32) * (x_rstd * factor)
    elif SCALED:
        factor = scales if LATE else load_column(scales, n, ok, FIRST)
        sums = sums * factor
    if X_NORM == "layer" and not CENTERED:
        w_sum = w_sums if LATE else load_column(w_sums, n, ok, FIRST)
        sums = x_rstd * (sums - x_mean * w_sum)
    elif X_NORM != "none":
        sums = x_rstd * sums
    if HAS_BIAS:
        shift = bias if LATE else load_column(bias, n, ok, FIRST)
        sums += shift
    return sums


@triton.jit
def load_residual(residual_ptr, residual_row, residual_norm_ptr, m, m_ok, n, n_ok):
    residual = tl.load(
        residual_ptr + m.to(tl.int64) * residual_row + n, mask=m_ok & n_ok, other=0.0
    )
    if RESIDUAL_NORM != "none":
        gamma = tl.load(residual_norm_ptr + n, mask=n_ok, other=0.0).to(tl.float32)
        beta = tl.load(residual_norm_ptr + n + N, mask=n_ok, other=0.0).to(tl.float32)
    else:
        gamma = 1.0
        beta = 0.0
    return residual, gamma, beta


@triton.jit
def merge_residual(part_mean, part_m2, residual_stats_ptr, m, m_ok, tokens, M_TILE: tl.constexpr):
    if RESIDUAL_WAITS:
        mean, rstd = merge_loaded(
            part_mean, part_m2, RESIDUAL_STEP, N, RESIDUAL_TILE, RESIDUAL_EPS,
            RESIDUAL_NORM == "rms",
        )  # fmt: skip
    elif RESIDUAL_NORM != "none":
        mean, rstd = merge_in_steps(
            residual_stats_ptr, m, m_ok, tokens, M_TILE, RESIDUAL_PARTS, RESIDUAL_STEP, N,
            RESIDUAL_TILE, RESIDUAL_EPS, RESIDUAL_NORM == "rms",
        )  # fmt: skip
    else:
        mean = 0.0
        rstd = 1.0
    return mean, rstd


@triton.jit
def add_residual(sums, residual, gamma, beta, mean, rstd):
    added = residual.to(tl.float32)
    if RESIDUAL_NORM == "layer":
        added = added - mean
    if RESIDUAL_NORM != "none":
        added = added * rstd * gamma + beta
    sums += added
    return sums


@triton.jit
def store(
    sums, out_ptr, out_row, stats_ptr, tokens, m, m_ok, n_tile, n, n_ok, N_TILE: tl.constexpr
):
    out = sums.to(STORED)
    tl.store(out_ptr + m.to(tl.int64) * out_row + n, out, mask=m_ok & n_ok)
    if HAS_STATS:
        value = out.to(tl.float32)
        if N_MASKED:
            held = tl.minimum(N - n_tile * N_TILE, N_TILE).to(tl.float32)
            value = tl.where(n_ok, value, 0.0)
        else:
            held = N_TILE * 1.0
        tile_mean = tl.sum(value, 1, keep_dims=True) / held
        off_mean = value - tile_mean
        if N_MASKED:
            off_mean = tl.where(n_ok, off_mean, 0.0)
        tile_m2 = tl.sum(off_mean * off_mean, 1, keep_dims=True)
        stat = stats_ptr + m.to(tl.int64) * N_TILES + n_tile
        tl.store(stat, tile_mean, mask=m_ok)
        tl.store(stat + tokens.to(tl.int64) * N_TILES, tile_m2, mask=m_ok)
    if HAS_PEAKS:
        leave_peaks(out, stats_ptr, m, m_ok, n_ok, n_tile, N_TILES, N_MASKED)


@triton.jit
def gemm(
    x_ptr, w_ptr, bias_ptr, sums_ptr, scales_ptr, x_scale_ptr, x_stats_ptr, residual_ptr,
    residual_norm_ptr, residual_stats_ptr, out_ptr, stats_ptr, partial_ptr, turns_ptr, ends_ptr,
    status_ptr, tokens, x_row, w_row, out_row, residual_row,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    w_ptr, n_tile, m, n, m_ok, n_ok, begin, end = find_place(
        w_ptr, ends_ptr, status_ptr, tokens, M_TILE, N_TILE, K_TILE
    )
    if SPLITS > 1:
        if not X_WAITS:
            x_mean, x_rstd = merge_x(x_stats_ptr, x_scale_ptr, m, m_ok, tokens, M_TILE)
        part, gate_part = multiply(
            x_ptr, x_row, 0.0 if X_WAITS else x_mean, w_ptr, w_row, scales_ptr, m, m_ok, n_tile,
            n, n_ok, begin, end, M_TILE, N_TILE, K_TILE,
        )  # fmt: skip
        turn, parts, inside = leave_part(
            part, gate_part, partial_ptr, turns_ptr, SPLITS, GATED, M_TILE, N_TILE
        )
    if SPLITS == 1 or turn == SPLITS - 1:
        if SPLITS > 1:
            tl.store(turns_ptr + tl.program_id(0), 0)
        if LATE:
            begin_asking()
        x_means, x_m2s = load_statistics(x_stats_ptr, m, m_ok, tokens, X_WAITS, X_PARTS, X_STEP)
        residual_means, residual_m2s = load_statistics(
            residual_stats_ptr, m, m_ok, tokens, RESIDUAL_WAITS, RESIDUAL_PARTS, RESIDUAL_STEP
        )
        if LATE:
            scales, w_sums, bias = load_columns(scales_ptr, sums_ptr, bias_ptr, n, n_ok, 0)
            if GATED:
                gate_scales, gate_w_sums, gate_bias = load_columns(
                    scales_ptr, sums_ptr, bias_ptr, n, n_ok, N
                )
            if HAS_RESIDUAL:
                residual, gamma, beta = load_residual(
                    residual_ptr, residual_row, residual_norm_ptr, m, m_ok, n, n_ok
                )
        if SPLITS == 1:
            if not X_WAITS:
                x_mean, x_rstd = merge_x(x_stats_ptr, x_scale_ptr, m, m_ok, tokens, M_TILE)
            sums, gate = multiply(
                x_ptr, x_row, 0.0 if X_WAITS else x_mean, w_ptr, w_row, scales_ptr, m, m_ok,
                n_tile, n, n_ok, begin, end, M_TILE, N_TILE, K_TILE,
            )  # fmt: skip
        else:
            sums, gate = add_parts(parts, inside, SPLITS, UNROLLED, GATED, SUMS, M_TILE, N_TILE)
        if X_WAITS:
            x_mean, x_rstd = merge_loaded(x_means, x_m2s, X_STEP, K, X_TILE, X_EPS, X_NORM == "rms")
        if not LATE:
            scales = scales_ptr
            w_sums = sums_ptr
            bias = bias_ptr
        sums = apply_columns(sums, scales, w_sums, bias, n, n_ok, x_mean, x_rstd, 0)
        if GATED:
            gate = apply_columns(
                gate, gate_scales if LATE else scales, gate_w_sums if LATE else w_sums,
                gate_bias if LATE else bias, n, n_ok, x_mean, x_rstd, N,
            )  # fmt: skip
        sums = activate(sums, gate, ACTIVATION, LIGHT_GELU, GATED)
        if HAS_RESIDUAL:
            residual_mean, residual_rstd = merge_residual(
                residual_means, residual_m2s, residual_stats_ptr, m, m_ok, tokens, M_TILE
            )
            if not LATE:
                residual, gamma, beta = load_residual(
                    residual_ptr, residual_row, residual_norm_ptr, m, m_ok, n, n_ok
                )
            sums = add_residual(sums, residual, gamma, beta, residual_mean, residual_rstd)
        store(sums, out_ptr, out_row, stats_ptr, tokens, m, m_ok, n_tile, n, n_ok, N_TILE)
