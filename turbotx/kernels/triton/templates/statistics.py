"""Row statistics that a GEMM has left, (mean, m2) of PARTS tiles a row, merged to mean and rstd.

In: (2, tokens, PARTS) float32, of TILE columns each, a row having WIDTH. They merge without
cancellation (Chan, Golub & LeVeque 1979), STEP at a time. RMS: rstd is that of the squares.
"""

import triton
import triton.language as tl


@triton.jit
def load_statistics(
    stats_ptr, m, m_ok, tokens, WANTED: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr
):
    if WANTED:
        part = tl.arange(0, STEP)[None, :]
        part_ok = m_ok & (part < PARTS)
        at = stats_ptr + m.to(tl.int64) * PARTS + part
        part_mean = tl.load(at, mask=part_ok, other=0.0)
        at += tokens.to(tl.int64) * PARTS
        part_m2 = tl.load(at, mask=part_ok, other=0.0)
    else:
        part_mean = 0.0
        part_m2 = 0.0
    return part_mean, part_m2


@triton.jit
def merge_loaded(
    part_mean, part_m2, STEP: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    EPS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """Statistics of rows, from those of their tiles."""
    tile = tl.arange(0, STEP)[None, :]
    count = tl.maximum(tl.minimum(WIDTH - tile * TILE, TILE), 0).to(tl.float32)
    mean = tl.sum(part_mean * count, 1, keep_dims=True) / WIDTH
    off = part_mean - mean
    off = part_m2 + count * off * off
    m2 = tl.sum(off, 1, keep_dims=True)
    rstd = tl.rsqrt((m2 / WIDTH + mean * mean if RMS else m2 / WIDTH) + EPS)
    return mean, rstd


@triton.jit
def merge_in_steps(
    stats_ptr, m, m_ok, tokens, M_TILE: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """Statistics of rows, from those of their tiles, a few at a time."""
    mean = tl.zeros((M_TILE, 1), tl.float32)
    m2 = tl.zeros((M_TILE, 1), tl.float32)
    for first in range(0, PARTS, STEP):
        part = first + tl.arange(0, STEP)[None, :]
        count = tl.maximum(tl.minimum(WIDTH - part * TILE, TILE), 0).to(tl.float32)
        at = stats_ptr + m.to(tl.int64) * PARTS + part
        part_mean = tl.load(at, mask=m_ok & (part < PARTS), other=0.0)
        mean += tl.sum(part_mean * count, 1, keep_dims=True) / WIDTH
    for first in range(0, PARTS, STEP):
        part = first + tl.arange(0, STEP)[None, :]
        count = tl.maximum(tl.minimum(WIDTH - part * TILE, TILE), 0).to(tl.float32)
        at = stats_ptr + m.to(tl.int64) * PARTS + part
        part_mean = tl.load(at, mask=m_ok & (part < PARTS), other=0.0)
        at += tokens.to(tl.int64) * PARTS
        part_m2 = tl.load(at, mask=m_ok & (part < PARTS), other=0.0)
        off = part_mean - mean
        m2 += tl.sum(part_m2 + count * off * off, 1, keep_dims=True)
    rstd = tl.rsqrt((m2 / WIDTH + mean * mean if RMS else m2 / WIDTH) + EPS)
    return mean, rstd
