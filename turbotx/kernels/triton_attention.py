"""Print an attention launch as Triton: a flash-attention forward pass, scores never in memory.

In: an `AttentionKernel`, and whether there is a key mask. Out: stand-alone source of one function
over the operands of the C++ launch: q, k and v in place by strides (a packed GEMM's output among
them), out head-merged, then the sizes of `cpp_attention.SIZES`, dots written as underscores::

    args: q_ptr, k_ptr, v_ptr, out_ptr, [key_mask_ptr], [bias_ptr], sizes...   grid: q tiles x heads

Online softmax after Milakov & Gimelshein 2018, tiling after Dao et al. 2022 (FlashAttention).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from turbotx.kernels.cpp_attention import SIZES, AttentionKernel
from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton_reduce import TYPES

# log2(e): exponentials are powers of two, which GPUs have an instruction for.
LOG2E = math.log2(math.e)
MOST = repr(torch.finfo(torch.float32).max)
NAMES = tuple(name.replace(".", "_") for name in SIZES)
# The sizes that are strides between vectors of head_dim: multiples of 16 in any packed layout.
STRIDES = tuple(n for n in NAMES if n.split("_")[0] in ("q", "k", "v", "out") and "len" not in n)


@dataclass(frozen=True)
class AttentionSchedule:
    """Queries and keys of a tile, warps, and how many tiles of keys are in flight."""

    q_tile: int
    k_tile: int
    num_warps: int = 4
    num_stages: int = 2


def choose_attention_schedule(
    kernel: AttentionKernel, q_len: int | None = None
) -> AttentionSchedule:
    """Return one of two schedules for a kernel: for few queries (16 or less), and for many.

    Tiles are as large as registers and 64 KiB of shared memory allow on every target.
    """
    depth = max(16, power_above(kernel.head_dim))
    few = q_len is not None and q_len <= 16
    if kernel.dtype.itemsize >= 4:
        # Full float32 products run on the ordinary units: small tiles keep them in registers.
        q_tile = 32 if depth == 64 and not few else 16
        return AttentionSchedule(q_tile, 32 if depth <= 64 else 16, 8 if depth == 128 else 4, 1)
    if few:
        return AttentionSchedule(16, 64 if depth <= 128 else 32, 4)
    return AttentionSchedule(64, 64 if depth <= 128 else 32, 4 if depth <= 64 else 8)


def print_triton_attention(
    kernel: AttentionKernel,
    schedule: AttentionSchedule | None = None,
    key_mask: bool = False,
    name: str | None = None,
) -> str:
    """Return the Triton source of an attention launch."""
    return _Attention(kernel, schedule or choose_attention_schedule(kernel), key_mask).text(
        name or kernel.name
    )


class _Attention:
    def __init__(
        self, kernel: AttentionKernel, schedule: AttentionSchedule, key_mask: bool
    ) -> None:
        self.kernel, self.schedule, self.key_mask = kernel, schedule, key_mask
        self.depth = max(16, power_above(kernel.head_dim))
        self.padded = self.depth != kernel.head_dim
        self.stored = TYPES[kernel.dtype]
        self.exact = kernel.dtype is torch.float32

    def text(self, name: str) -> str:
        arguments = ["q_ptr", "k_ptr", "v_ptr", "out_ptr"]
        arguments += ["key_mask_ptr"] * self.key_mask
        arguments += ["bias_ptr"] * (self.kernel.bias != "none")
        arguments += [*NAMES, "Q_TILE: tl.constexpr", "K_TILE: tl.constexpr"]
        head = [f"def {name}(", *(f"    {a}," for a in arguments), "):"]
        body = [*self._queries(), *self._keys(), *self._output()]
        lines = ["@triton.jit", *head, *(f"    {line}" if line else "" for line in body)]
        return "\n".join([*self._header(name), *lines]) + "\n"

    def _header(self, name: str) -> list[str]:
        k = self.kernel
        hidden = [w for w, on in (("a key mask", self.key_mask), ("causal", k.causal)) if on]
        hidden += [f"{k.bias} bias"] if k.bias != "none" else []
        return [
            f"# {name}",
            f"#   softmax(q k^T * {k.scale!r}) v with head_dim {k.head_dim}"
            + (f", {', '.join(hidden)}" if hidden else ""),
            f"#   tiles of {self.schedule.q_tile} queries x {self.schedule.k_tile} keys,"
            f" {self.schedule.num_warps} warps",
            "import triton",
            "import triton.language as tl",
            "",
            "",
        ]

    def _mask(self, *masks: str, other: bool = True) -> str:
        """Return the mask of a load of vectors of head_dim."""
        listed = [*masks, *(["dim_ok"] if self.padded else [])]
        return f"mask={' & '.join(listed)}" + (", other=0.0" if other else "")

    def _queries(self) -> list[str]:
        lines = [
            "batch_index = (tl.program_id(1) // heads).to(tl.int64)",
            "head = (tl.program_id(1) % heads).to(tl.int64)",
            "kv_head = head // (heads // kv_heads)",
            "row = tl.program_id(0) * Q_TILE + tl.arange(0, Q_TILE)[:, None]",
            f"dim = tl.arange(0, {self.depth})[None, :]",
            "row_ok = row < q_len",
        ]
        lines += [f"dim_ok = dim < {self.kernel.head_dim}"] * self.padded
        return [
            *lines,
            "q_ptr += batch_index * q_batch + head * q_head",
            "k_ptr += batch_index * k_batch + kv_head * k_head",
            "v_ptr += batch_index * v_batch + kv_head * v_head",
            f"q = tl.load(q_ptr + row.to(tl.int64) * q_row + dim, {self._mask('row_ok')})",
            "",
            "# For each query: the largest score so far, the sum of exponentials, of values.",
            'largest = tl.full((Q_TILE, 1), float("-inf"), tl.float32)',
            "total = tl.zeros((Q_TILE, 1), tl.float32)",
            f"values = tl.zeros((Q_TILE, {self.depth}), tl.float32)",
        ]

    def _keys(self) -> list[str]:
        k = self.kernel
        end = "k_len"
        lines = []
        if k.causal:
            end = "end"
            lines = [
                "# Keys after this tile's last query are seen by none of it.",
                "end = tl.minimum(k_len, (tl.program_id(0) + 1) * Q_TILE)",
            ]
        precision = ', input_precision="ieee"' if self.exact else ""
        step = [
            "col = start + tl.arange(0, K_TILE)[None, :]",
            "key = start + tl.arange(0, K_TILE)[:, None]",
            "key_ok = key < k_len",
            f"k = tl.load(k_ptr + key.to(tl.int64) * k_row + dim, {self._mask('key_ok')})",
            f"scores = tl.dot(q, tl.trans(k){precision}) * {k.scale * LOG2E!r}",
            *self._visible(),
            'scores = tl.where(visible, scores, float("-inf"))',
            "larger = tl.maximum(largest, tl.max(scores, 1, keep_dims=True))",
            "# A query that has seen no key yet has no largest score to subtract.",
            'shift = tl.where(larger == float("-inf"), 0.0, larger)',
            "share = tl.exp2(scores - shift)",
            "fade = tl.exp2(largest - shift)",
            "total = total * fade + tl.sum(share, 1, keep_dims=True)",
            f"v = tl.load(v_ptr + key.to(tl.int64) * v_row + dim, {self._mask('key_ok')})",
            f"values = values * fade + tl.dot(share.to({self.stored}), v{precision})",
            "largest = larger",
        ]
        return [
            *lines,
            f"for start in range(0, {end}, K_TILE):",
            *(f"    {line}" for line in step),
            "",
        ]

    def _visible(self) -> list[str]:
        """Lines that decide which keys a query sees, and that add the bias to its scores."""
        k = self.kernel
        lines = ["visible = (col < k_len) & row_ok"]
        if self.key_mask:
            lines += [
                "mask = tl.load(",
                "    key_mask_ptr + batch_index * key_mask_stride + col, mask=col < k_len, other=0",
                ")",
                "visible = visible & (mask != 0)",
            ]
        if k.causal:
            lines.append("visible = visible & (col <= row)")
        if k.bias == "none":
            return lines
        lines += [
            "bias = tl.load(",
            "    bias_ptr + batch_index * bias_batch + head * bias_head",
            "    + row.to(tl.int64) * bias_q + col.to(tl.int64) * bias_k,",
            "    mask=visible,",
            "    other=0,",
            ")",
        ]
        if k.bias == "boolean":
            return [*lines, "visible = visible & (bias != 0)"]
        return [
            *lines,
            "bias = bias.to(tl.float32)",
            "# The most negative float hides a key only beside others, -inf always.",
            f"bounded = tl.clamp(bias * {LOG2E!r}, -{MOST}, {MOST})",
            f"scores += tl.where(tl.abs(bias) <= {MOST}, bounded, bias)",
        ]

    def _output(self) -> list[str]:
        mask = self._mask("row_ok", other=False)
        zeros = "total == 0.0"
        lines = ["# A query that sees no key gets zeros."]
        if self.kernel.blind_nan:
            zeros = "(total == 0.0) & (k_len == 0)"
            lines = ["# A query that sees no key of some gets 0 / 0."]
        return [
            *lines,
            f"values = values / tl.where({zeros}, 1.0, total)",
            "out_ptr += batch_index * out_batch + head * out_head",
            "tl.store(",
            "    out_ptr + row.to(tl.int64) * out_row + dim,",
            f"    values.to({self.stored}),",
            f"    {mask},",
            ")",
        ]


def attention_grid(
    schedule: AttentionSchedule, batch: int, heads: int, q_len: int
) -> tuple[int, int, int]:
    """Return the number of programs: tiles of queries, and heads of all sequences."""
    return -(-q_len // schedule.q_tile), batch * heads, 1
