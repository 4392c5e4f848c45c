"""Print an attention launch as Triton: a flash-attention forward pass, scores never in memory.

In: an `AttentionKernel`. Out: stand-alone source of one function over the operands of the C++
launch: q, k and v in place by strides (a packed GEMM's output among them), out head-merged, then
the sizes of `cpp_attention.SIZES`, dots written as underscores. One program a tile of queries::

    args: q_ptr, k_ptr, v_ptr, out_ptr, [keys_ptr: mask or lengths], [bias_ptr], sizes...

Where all keys are in one tile there is no loop, and nothing to carry through one.
Online softmax after Milakov & Gimelshein 2018, tiling after Dao et al. 2022 (FlashAttention).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from turbotx.ir.attention_ops import NO_WINDOW
from turbotx.kernels.cpp.attention import MOST_HIDDEN, SIZES, AttentionKernel
from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.functions import functions_in
from turbotx.kernels.triton.reduce import TYPES

# log2(e): exponentials are powers of two, which GPUs have an instruction for.
LOG2E = math.log2(math.e)
# As many as fit the smallest tile of a matrix unit.
FEW_QUERIES = 16
# Up to here one tile may have all keys of a sequence's attention to itself.
ONE_TILE = 64
MOST = repr(torch.finfo(torch.float32).max)
# Sequences are along a grid's third axis, which has room for as many: no division then finds a
# program's place, which would take longer than all else before its first load.
MOST_DEEP = 65535
NAMES = tuple(name.replace(".", "_") for name in SIZES)
# The sizes that are strides between vectors of head_dim: multiples of 16 in any packed layout.
STRIDES = tuple(n for n in NAMES if n.split("_")[0] in ("q", "k", "v", "out") and "len" not in n)


@dataclass(frozen=True)
class AttentionSchedule:
    """Queries and keys of a tile, warps, and how many tiles of keys are in flight.

    once: 1 for the form without a loop where one tile has all keys; it is right nowhere else.
    """

    q_tile: int
    k_tile: int
    num_warps: int = 4
    num_stages: int = 2
    once: int = 0


def choose_attention_schedule(
    kernel: AttentionKernel, q_len: int | None = None
) -> AttentionSchedule:
    """Return one of two schedules for a kernel: for few queries, and for many.

    Tiles are as large as registers and 64 KiB of shared memory allow on every target. Of 64
    queries a warp has whole rows, and needs no other's sums. For short sequences they are `once`,
    which `with_keys` takes back where there are more keys.
    """
    schedule = _tiles_for(kernel, q_len)
    return replace(schedule, once=int(q_len is not None and q_len <= ONE_TILE))


def with_keys(schedule: AttentionSchedule, k_len: int) -> AttentionSchedule:
    """Return the schedule for a number of keys: in a loop where they do not fit one tile."""
    return replace(schedule, once=0) if k_len > schedule.k_tile else schedule


def _tiles_for(kernel: AttentionKernel, q_len: int | None) -> AttentionSchedule:
    depth = max(16, power_above(kernel.head_dim))
    few = q_len is not None and q_len <= FEW_QUERIES
    if kernel.dtype.itemsize >= 4:
        # Full float32 products run on the ordinary units: small tiles keep them in registers.
        # (The assembler of Triton 3.6 spills at depth 16 with 16 rows, at 56 registers.)
        q_tile = 32 if depth == 16 or (depth == 64 and not few) else 16
        # 32 x 32 scores beside a bias and sums of depth 64 spilled 3 words of 4 warps on sm_90.
        wide = depth == 128 or (q_tile == 32 and depth == 64 and kernel.bias == "storage")
        return AttentionSchedule(q_tile, 32 if depth <= 64 else 16, 8 if wide else 4, 1)
    if few:
        return AttentionSchedule(16, 64 if depth <= 128 else 32, 4)
    # A bias in flight beside the scores does not fit the registers of four warps, nor, beside
    # sums of depth 128, those of eight with 64 keys.
    wide = depth > 64 or kernel.bias == "storage"
    short = depth > 128 or (depth == 128 and kernel.bias != "none")
    # With two tiles in flight a boolean bias beside sums of depth 128 spilled 2 words on sm_100
    # (Triton 3.6).
    stages = 1 if depth == 128 and kernel.bias == "boolean" else 2
    return AttentionSchedule(64, 32 if short else 64, 8 if wide else 4, stages)


def print_triton_attention(
    kernel: AttentionKernel, schedule: AttentionSchedule | None = None, name: str | None = None
) -> str:
    """Return the Triton source of an attention launch."""
    return _Attention(kernel, schedule or choose_attention_schedule(kernel)).text(
        name or kernel.name
    )


class _Attention:
    def __init__(self, kernel: AttentionKernel, schedule: AttentionSchedule) -> None:
        self.kernel, self.schedule = kernel, schedule
        self.depth = max(16, power_above(kernel.head_dim))
        self.padded = self.depth != kernel.head_dim
        self.stored = TYPES[kernel.dtype]
        self.exact = kernel.dtype is torch.float32
        # The places, relative to a query's own, of the first and last key that it may see.
        left, right = kernel.window
        self.left = left if left >= 0 else None
        self.right = 0 if kernel.causal else right if right >= 0 else None
        self.shift = " + (k_len - q_len)" if kernel.late else ""
        self.count = "count" if kernel.keys == "lengths" else "k_len"

    def text(self, name: str) -> str:
        arguments = ["q_ptr", "k_ptr", "v_ptr", "out_ptr"]
        arguments += ["keys_ptr"] * (self.kernel.keys != "all")
        arguments += ["bias_ptr"] * (self.kernel.bias != "none")
        arguments += [*NAMES, "Q_TILE: tl.constexpr", "K_TILE: tl.constexpr"]
        head = [f"def {name}(", *(f"    {a}," for a in arguments), "):"]
        body = [*self._queries(), *self._keys(), *self._output()]
        lines = ["@triton.jit", *head, *(f"    {line}" if line else "" for line in body)]
        called = [f"{f}\n\n" for f in functions_in("\n".join(lines))]
        return "\n".join([*self._header(name), *called, *lines]) + "\n"

    def _header(self, name: str) -> list[str]:
        k = self.kernel
        hidden = [] if k.keys == "all" else ["a key mask" if k.keys == "mask" else "lengths"]
        hidden += ["causal"] * k.causal
        hidden += ["queries at the last keys"] * k.late
        hidden += [f"a window of {k.window}"] * (k.window != NO_WINDOW)
        hidden += [f"scores capped at {k.softcap!r}"] * (k.softcap != 0)
        hidden += [f"{k.bias} bias"] * (k.bias != "none")
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
            "tile = tl.program_id(0)",
            "head = tl.program_id(1)",
            "batch_index = tl.program_id(2)",
            f"if batch >= {MOST_DEEP}:  # the others are along the first axis",
            "    tiles = tl.cdiv(q_len, Q_TILE)",
            "    batch_index += tile // tiles * tl.num_programs(2)",
            "    tile = tile % tiles",
            "    q_len = tl.where(batch_index < batch, q_len, 0)",
            "    batch_index = tl.minimum(batch_index, batch - 1)",
            "kv_head = head",
            "if kv_heads != heads:",
            "    kv_head = head // (heads // kv_heads)",
            "batch_index = batch_index.to(tl.int64)",
            "head = head.to(tl.int64)",
            "kv_head = kv_head.to(tl.int64)",
            "first = tile * Q_TILE",
            "row = first + tl.arange(0, Q_TILE)[:, None]",
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
        ]

    def _keys(self) -> list[str]:
        return [*self._all_keys(), ""] if self.schedule.once else self._tiles_of_keys()

    def _all_keys(self) -> list[str]:
        """Attention over all keys at once."""
        lines = self._lengths()
        load = self._load("v")
        return [
            *lines,
            "start = 0",
            *self._mask_of_keys(),
            *self._scores(load),
            "largest = tl.max(scores, 1, keep_dims=True)",
            "# A query that sees no key has no largest score to subtract.",
            'shift = tl.where(largest == float("-inf"), 0.0, largest)',
            "share = tl.exp2(scores - shift)",
            "total = tl.sum(share, 1, keep_dims=True)",
            f"values = tl.dot(share.to({self.stored}), v{self._precision()})",
        ]

    def _tiles_of_keys(self) -> list[str]:
        """Attention over a tile of keys at a time."""
        carried = [
            "# For each query: the largest score so far, the sum of exponentials, of values.",
            'largest = tl.full((Q_TILE, 1), float("-inf"), tl.float32)',
            "total = tl.zeros((Q_TILE, 1), tl.float32)",
            f"values = tl.zeros((Q_TILE, {self.depth}), tl.float32)",
        ]
        lines, begin, end = self._range()
        step = [
            *self._mask_of_keys(),
            *self._scores(),
            "larger = tl.maximum(largest, tl.max(scores, 1, keep_dims=True))",
            "# A query that has seen no key yet has no largest score to subtract.",
            'shift = tl.where(larger == float("-inf"), 0.0, larger)',
            "share = tl.exp2(scores - shift)",
            "fade = tl.exp2(largest - shift)",
            "total = total * fade + tl.sum(share, 1, keep_dims=True)",
            *self._load("v"),
            f"values = values * fade + tl.dot(share.to({self.stored}), v{self._precision()})",
            "largest = larger",
        ]
        return [
            *carried,
            *lines,
            f"for start in range({begin}, {end}, K_TILE):",
            *(f"    {line}" for line in step),
            "",
        ]

    def _range(self) -> tuple[list[str], str, str]:
        """Return lines, and the bounds (half-open) of the keys that some query of the tile sees."""
        lines, begin, end = self._lengths(), "0", self.count
        if self.right is not None or self.left is not None:
            lines.append("# Keys that no query of this tile sees are not visited.")
        if self.right is not None:
            reach = f" + {self.right}" if self.right else ""
            lines.append(f"end = tl.minimum({self.count}, first{self.shift} + Q_TILE{reach})")
            end = "end"
        if self.left is not None:
            first = f"first{self.shift} - {self.left}"
            lines.append(f"begin = tl.maximum({first}, 0) // K_TILE * K_TILE")
            begin = "begin"
        return lines, begin, end

    def _lengths(self) -> list[str]:
        if self.kernel.keys != "lengths":
            return []
        return ["count = tl.minimum(tl.load(keys_ptr + batch_index), k_len).to(tl.int32)"]

    def _mask_of_keys(self) -> list[str]:
        """Where the keys of a tile are, and which are hidden: asked for before the keys, whose way
        takes as long."""
        lines = [
            "col = start + tl.arange(0, K_TILE)[None, :]",
            "key = start + tl.arange(0, K_TILE)[:, None]",
            f"key_ok = key < {self.count}",
        ]
        if self.kernel.keys == "mask":
            lines += [
                "mask = tl.load(",
                "    keys_ptr + batch_index * key_mask_stride + col, mask=col < k_len, other=0",
                ")",
            ]
        return lines

    def _scores(self, ahead: Iterable[str] = ()) -> list[str]:
        """Scores of a tile of keys, -inf where a key is not seen; `ahead` is done before them."""
        k = self.kernel
        return [
            *self._load("k"),
            *ahead,
            f"scores = tl.dot(q, tl.trans(k){self._precision()}) * {k.scale * LOG2E!r}",
            *self._capped(),
            *self._visible(),
            *[f"scores = tl.where(mask != 0, scores, {MOST_HIDDEN!r})"] * k.blind_mean,
            'scores = tl.where(visible, scores, float("-inf"))',
        ]

    def _load(self, name: str) -> list[str]:
        """Load a tile of keys, or of values."""
        address = f"{name}_ptr + key.to(tl.int64) * {name}_row + dim"
        return [f"{name} = tl.load({address}, {self._mask('key_ok')})"]

    def _precision(self) -> str:
        return ', input_precision="ieee"' if self.exact else ""

    def _capped(self) -> list[str]:
        bound = self.kernel.softcap * LOG2E
        return [f"scores = tanh(scores * {1 / bound!r}) * {bound!r}"] if bound else []

    def _visible(self) -> list[str]:
        """Lines that decide which keys a query sees, and that add the bias to its scores."""
        k = self.kernel
        lines = [f"visible = col < {self.count}"]
        if k.keys == "mask" and not k.blind_mean:
            lines.append("visible = visible & (mask != 0)")
        if self.right is not None:
            reach = f" + {self.right}" if self.right else ""
            lines.append(f"visible = visible & (col <= row{self.shift}{reach})")
        if self.left is not None:
            lines.append(f"visible = visible & (col >= row{self.shift} - {self.left})")
        if k.bias == "none":
            return lines
        lines += [
            "bias = tl.load(",
            "    bias_ptr + batch_index * bias_batch + head * bias_head",
            "    + row.to(tl.int64) * bias_q + col.to(tl.int64) * bias_k,",
            "    mask=visible & row_ok,",
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
    """Return the number of programs: one a tile of queries, tiles of one head side by side."""
    folds = 1 + batch // MOST_DEEP  # without comparing: saved programs keep the arithmetic
    return -(-q_len // schedule.q_tile) * folds, heads, -(-batch // folds)
