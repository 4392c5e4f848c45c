"""Which keys a tile of attention has, what queries score them, and what is made of the sums."""

import triton
import triton.language as tl

from turbotx.kernels.triton.templates.functions import tanh

# As in attention.py.
PRECISION = tl.constexpr(None)
SCALE = tl.constexpr(None)
CAP = tl.constexpr(None)
KEYS = tl.constexpr(None)
BIAS = tl.constexpr(None)
LEFT = tl.constexpr(None)
RIGHT = tl.constexpr(None)
BLIND_NAN = tl.constexpr(None)

LOG2E = tl.constexpr(1.4426950408889634)
MOST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def find_keys(start, keys_ptr, k_len, count, K_TILE: tl.constexpr):
    col = start + tl.arange(0, K_TILE)[None, :]
    key = start + tl.arange(0, K_TILE)[:, None]
    key_ok = key < count
    if KEYS == "mask":
        # Asked for before the keys, whose way takes as long.
        mask = tl.load(keys_ptr + col, mask=col < k_len, other=0)
    else:
        mask = 0
    return col, key, key_ok, mask


@triton.jit
def score_keys(q, k, mask, row, row_ok, col, count, bias_ptr, bias_q, bias_k):
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2E)
    if CAP != 0.0:
        scores = tanh(scores * (1.0 / (CAP * LOG2E))) * (CAP * LOG2E)
    visible = col < count
    if KEYS == "mask":
        visible = visible & (mask != 0)
    if RIGHT is not None:
        visible = visible & (col <= row + RIGHT)
    if LEFT is not None:
        visible = visible & (col >= row - LEFT)
    if BIAS != "none":
        bias_at = bias_ptr + row.to(tl.int64) * bias_q + col.to(tl.int64) * bias_k
        bias = tl.load(bias_at, mask=visible & row_ok, other=0)
        if BIAS == "boolean":
            visible = visible & (bias != 0)
        else:
            bias = bias.to(tl.float32)
            # The most negative float hides a key only beside others, -inf always.
            bounded = tl.clamp(bias * LOG2E, -MOST, MOST)
            scores += tl.where(tl.abs(bias) <= MOST, bounded, bias)
    scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def divide(values, total, k_len):
    if BLIND_NAN:
        # A query that sees no key of some gets 0 / 0.
        zeros = (total == 0.0) & (k_len == 0)
    else:
        # A query that sees no key gets zeros.
        zeros = total == 0.0
    return values / tl.where(zeros, 1.0, total)
