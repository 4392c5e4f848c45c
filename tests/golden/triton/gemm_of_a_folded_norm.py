# gemm_float16_3072x768_layer_norm_bias_gelu
#   out = gelu(layer_norm(x) w^T + bias), w 3072 x 768
#   tiles of 64 x 32, 128 at a time, 4 warps, 3 stages
import triton
import triton.language as tl


@triton.jit
def gelu(x):
    """x Phi(x) for results of 16 bits: Phi(-|x|) is a power of two, to 2^-17, and to 2^-8 at 8."""
    a = tl.abs(x)
    power = -1.75619198e-06 * a + 6.00929161e-05
    power = power * a - 9.19088430e-04
    power = power * a + 8.46408308e-03
    power = power * a - 5.38713522e-02
    power = power * a - 4.58554953e-01
    power = power * a - 1.15121150
    tail = tl.exp2(power * a - 1.0)
    return x * tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def gemm_float16_3072x768_layer_norm_bias_gelu(
    x_ptr,
    w_ptr,
    bias_ptr,
    sums_ptr,
    scales_ptr,
    x_stats_ptr,
    out_ptr,
    tokens,
    x_row,
    w_row,
    out_row,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
):
    # Programs of a few tiles of tokens go through the weight together.
    m_tiles = tl.cdiv(tokens, M_TILE)
    group = tl.program_id(0) // 768 * 8
    height = tl.minimum(m_tiles - group, 8)
    place = tl.program_id(0) % 768
    m_tile = group
    n_tile = place
    if height > 1:
        # Exact below 2**20; a division of integers is a call, which spills registers.
        n_tile = ((place.to(tl.float32) + 0.5) / height.to(tl.float32)).to(tl.int32)
        m_tile = group + place - n_tile * height
    m = m_tile * M_TILE + tl.arange(0, M_TILE)[:, None]
    n = n_tile * N_TILE + tl.arange(0, N_TILE)[None, :]
    m_ok = m < tokens

    # From here on it reads what other kernels have written.

    # What is done to the sums asks for its operands before they are made.
    part = tl.arange(0, 32)[None, :]
    part_ok = m_ok & (part < 24)
    at = x_stats_ptr + m.to(tl.int64) * 24 + part
    x_means = tl.load(at, mask=part_ok, other=0.0)
    at += tokens.to(tl.int64) * 24
    x_m2s = tl.load(at, mask=part_ok, other=0.0)
    scales = tl.load(scales_ptr + n).to(tl.float32)
    w_sums = tl.load(sums_ptr + n).to(tl.float32)
    bias = tl.load(bias_ptr + n).to(tl.float32)

    # The sums over k.
    sums = tl.zeros((M_TILE, N_TILE), tl.float32)
    for start in range(0, 768, K_TILE):
        k = start + tl.arange(0, K_TILE)[None, :]
        down = n_tile * N_TILE + tl.arange(0, N_TILE)[:, None]
        w = tl.trans(tl.load(w_ptr + down.to(tl.int64) * w_row + k))
        # Behind the weight, which comes from farther away.
        x = tl.load(x_ptr + m.to(tl.int64) * x_row + k, mask=m_ok, other=0.0)
        sums = tl.dot(x, w, sums)

    # Statistics of rows, from those of their tiles.
    tile = tl.arange(0, 32)[None, :]
    count = tl.maximum(tl.minimum(768 - tile * 32, 32), 0).to(tl.float32)
    x_mean = tl.sum(x_means * count, 1, keep_dims=True) / 768
    off = x_means - x_mean
    off = x_m2s + count * off * off
    m2 = tl.sum(off, 1, keep_dims=True)
    x_rstd = tl.rsqrt(m2 / 768 + 1e-05)
    sums = sums * scales
    sums = x_rstd * (sums - x_mean * w_sums)
    sums += bias
    sums = gelu(sums)
    out = sums.to(tl.float16)
    tl.store(out_ptr + m.to(tl.int64) * out_row + n, out, mask=m_ok)
