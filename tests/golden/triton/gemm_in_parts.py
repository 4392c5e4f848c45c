# gemm_bfloat16_100x1000_silu_gated_stats
#   out = silu(x w^T) * (second half of w), w 200 x 1000, with statistics
#   tiles of 16 x 32, 64 at a time, k in 4 parts, 4 warps, 3 stages
import triton
import triton.language as tl


@triton.jit
def gemm_bfloat16_100x1000_silu_gated_stats(
    x_ptr,
    w_ptr,
    out_ptr,
    stats_ptr,
    partial_ptr,
    turns_ptr,
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
    group = tl.program_id(0) // 32 * 8
    height = tl.minimum(m_tiles - group, 8)
    place = tl.program_id(0) % 32
    m_tile = group
    n_tile = place
    if height > 1:
        # Exact below 2**20; a division of integers is a call, which spills registers.
        n_tile = ((place.to(tl.float32) + 0.5) / height.to(tl.float32)).to(tl.int32)
        m_tile = group + place - n_tile * height
    m = m_tile * M_TILE + tl.arange(0, M_TILE)[:, None]
    n = n_tile * N_TILE + tl.arange(0, N_TILE)[None, :]
    m_ok = m < tokens
    n_ok = n < 100
    begin = tl.program_id(1) * 16 // 4 * K_TILE
    end = (tl.program_id(1) + 1) * 16 // 4 * K_TILE

    # From here on it reads what other kernels have written.

    # The sums over k.
    part = tl.zeros((M_TILE, N_TILE), tl.float32)
    gate_part = tl.zeros((M_TILE, N_TILE), tl.float32)
    for start in range(begin, end, K_TILE):
        k = start + tl.arange(0, K_TILE)[None, :]
        x_ok = m_ok & (k < 1000)
        down = n_tile * N_TILE + tl.arange(0, N_TILE)[:, None]
        down_ok = down < 100
        ok = down_ok & (k < 1000)
        w = tl.trans(tl.load(w_ptr + down.to(tl.int64) * w_row + k, mask=ok, other=0.0))
        # Behind the weight, which comes from farther away.
        x = tl.load(x_ptr + m.to(tl.int64) * x_row + k, mask=x_ok, other=0.0)
        part = tl.dot(x, w, part)
        gate_down = n_tile * N_TILE + tl.arange(0, N_TILE)[:, None]
        gate_down_ok = gate_down < 100
        gate_ok = gate_down_ok & (k < 1000)
        gate_w = tl.trans(
            tl.load(w_ptr + (gate_down + 100).to(tl.int64) * w_row + k, mask=gate_ok, other=0.0),
        )
        gate_part = tl.dot(x, gate_w, gate_part)

    # Every program leaves its part; the last to come adds them all, in order.
    size = 8 * M_TILE * N_TILE
    parts = partial_ptr + tl.program_id(0).to(tl.int64) * size
    inside = tl.arange(0, M_TILE)[:, None] * N_TILE + tl.arange(0, N_TILE)[None, :]
    tl.store(parts + tl.program_id(1) * 2 * (M_TILE * N_TILE) + inside, part)
    tl.store(parts + (tl.program_id(1) * 2 + 1) * (M_TILE * N_TILE) + inside, gate_part)
    tl.debug_barrier()
    turn = tl.atomic_add(turns_ptr + tl.program_id(0), 1, sem="acq_rel")
    if turn == 3:
        tl.store(turns_ptr + tl.program_id(0), 0)
        sums = tl.zeros((M_TILE, N_TILE), tl.float32)
        gate = tl.zeros((M_TILE, N_TILE), tl.float32)
        for split in tl.static_range(4):
            own = parts + split * 2 * (M_TILE * N_TILE) + inside
            sums += tl.load(own, cache_modifier=".cg")
            gate += tl.load(own + M_TILE * N_TILE, cache_modifier=".cg")
        sums = sums / (1.0 + tl.exp(-sums))
        sums = sums * gate
        out = sums.to(tl.bfloat16)
        tl.store(out_ptr + m.to(tl.int64) * out_row + n, out, mask=m_ok & n_ok)
        value = out.to(tl.float32)
        held = tl.minimum(100 - n_tile * N_TILE, N_TILE).to(tl.float32)
        value = tl.where(n_ok, value, 0.0)
        tile_mean = tl.sum(value, 1, keep_dims=True) / held
        off_mean = value - tile_mean
        off_mean = tl.where(n_ok, off_mean, 0.0)
        tile_m2 = tl.sum(off_mean * off_mean, 1, keep_dims=True)
        stat = stats_ptr + m.to(tl.int64) * 4 + n_tile
        tl.store(stat, tile_mean, mask=m_ok)
        tl.store(stat + tokens.to(tl.int64) * 4, tile_m2, mask=m_ok)
