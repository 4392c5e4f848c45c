"""A weight that is narrower than what it is multiplied as: unpacked in registers, as it is read.

int4: two numbers to a byte as `ir.int4_ops` packs them, with a scale for every SIZE inputs, and an
offset behind it where SHIFTED.
"""

import triton
import triton.language as tl


@triton.jit
def load_int4(
    w_ptr, w_row, scales_ptr, start, down, down_ok, STORED: tl.constexpr, SIZE: tl.constexpr,
    GROUPS: tl.constexpr, SHIFTED: tl.constexpr, MASKED: tl.constexpr, N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
):  # fmt: skip
    """Numbers times their groups' scales, plus offsets, rounded once, (N_TILE, K_TILE)."""
    byte = start // 2 + tl.arange(0, K_TILE // 2)[None, :]
    byte_ok = down_ok & (byte < GROUPS * SIZE // 2) if MASKED else down_ok
    packed = tl.load(w_ptr + down.to(tl.int64) * w_row + byte, mask=byte_ok, other=0)
    group = start // SIZE + tl.arange(0, K_TILE // SIZE)[None, :]
    group_ok = down_ok & (group < GROUPS) if MASKED else down_ok
    scale_ptr = scales_ptr + (down.to(tl.int64) * GROUPS + group) * (2 if SHIFTED else 1)
    scales = tl.load(scale_ptr, mask=group_ok, other=0.0)
    # Of eight inputs, those of even places are in the first two bytes.
    octets = tl.reshape(tl.join(packed & 15, packed >> 4), (N_TILE, K_TILE // 8, 2, 2, 2))
    octets = tl.permute(octets, (0, 1, 3, 4, 2))
    numbers = tl.reshape(octets, (N_TILE, K_TILE // SIZE, SIZE)) ^ 8
    # 2^23 + 8 and more, as bits: conversions of integers are slow.
    floats = (numbers.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    scaled = floats * tl.expand_dims(scales, 2)
    if SHIFTED:
        offsets = tl.load(scale_ptr + 1, mask=group_ok, other=0.0)
        scaled += tl.expand_dims(offsets, 2)
    w = tl.reshape(scaled.to(STORED), (N_TILE, K_TILE))
    return w
