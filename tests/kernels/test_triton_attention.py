"""Triton attention against float64: every mask, odd head dims and lengths, strided operands.

In: small operands on the CPU, in Triton's interpreter. Out: differences from the op's own meaning
in float64, bounded by PyTorch's own in the operands' dtype.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.kernels.triton_runner import TritonRunner, interpreting, load_function
from turbotx.attention import attention
from turbotx.kernels.cpp_attention import AttentionKernel
from turbotx.kernels.schedule import Schedule
from turbotx.kernels.targets import TARGETS, attention_job, build
from turbotx.kernels.triton_attention import (
    AttentionSchedule,
    attention_grid,
    choose_attention_schedule,
    print_triton_attention,
)
from turbotx.kernels.triton_softmax import softmax_kernel

SMALL = AttentionSchedule(q_tile=16, k_tile=16)


def run(kernel, q, k, v, key_mask=None, bias=None, schedule=SMALL):
    """Run the printed kernel over operands of any strides; out is (batch, q_len, heads, dim)."""
    batch, heads, q_len, width = q.shape
    out = torch.full((batch, q_len, heads, width), float("nan"), dtype=q.dtype)
    pointers = [t for t in (q, k, v, out, key_mask, bias) if t is not None]
    sizes = [batch, heads, k.shape[1], q_len, k.shape[2]]
    for t in (q, k, v):
        sizes += t.stride()[:3]
    sizes += [out.stride(0), out.stride(2), out.stride(1)]
    sizes.append(0 if key_mask is None else key_mask.stride(0))
    full = None if bias is None else bias.expand(batch, heads, q_len, k.shape[2])
    sizes += [0] * 4 if full is None else full.stride()
    source = print_triton_attention(kernel, schedule, key_mask is not None)
    with interpreting():
        grid = attention_grid(schedule, batch, heads, q_len)
        load_function(source, kernel.name)[grid](
            *pointers, *sizes, Q_TILE=schedule.q_tile, K_TILE=schedule.k_tile
        )
    return out


def operands(batch, heads, kv_heads, q_len, k_len, width, dtype=torch.float32):
    """q, k and v as windows on one packed GEMM output where the lengths allow it."""
    if q_len == k_len:
        packed = torch.randn(batch, q_len, heads + 2 * kv_heads, width, dtype=dtype)
        pieces = packed.split([heads, kv_heads, kv_heads], dim=2)
        return [p.transpose(1, 2) for p in pieces]
    shapes = [(heads, q_len), (kv_heads, k_len), (kv_heads, k_len)]
    return [torch.randn(batch, h, n, width, dtype=dtype) for h, n in shapes]


def check(out, q, k, v, key_mask=None, bias=None, *, scale, causal=False):
    mask = None if key_mask is None else key_mask[:, None, None, :]
    exact_bias = bias.double() if bias is not None and bias.is_floating_point() else bias
    exact = attention(
        q.double(), k.double(), v.double(), mask, exact_bias, scale=scale, causal=causal
    )
    own = attention(q, k, v, mask, bias, scale=scale, causal=causal).double()
    assert out.shape == exact.shape
    allowed = 2 * (own - exact).abs().max() + 4 * torch.finfo(q.dtype).eps
    assert (out.double() - exact).abs().max() <= allowed


def kernel(width, dtype=torch.float32, causal=False, bias="none", scale=None):
    return AttentionKernel(dtype, width, scale or 1 / math.sqrt(width), causal, bias)


@pytest.mark.parametrize("width", [16, 20, 64])
@pytest.mark.parametrize("length", [1, 15, 33])
def test_reads_packed_operands_in_place(width: int, length: int) -> None:
    q, k, v = operands(2, 2, 2, length, length, width)
    case = kernel(width)
    check(run(case, q, k, v), q, k, v, scale=case.scale)


@pytest.mark.parametrize(("q_len", "k_len"), [(3, 20), (20, 3), (17, 17)])
def test_causal(q_len: int, k_len: int) -> None:
    q, k, v = operands(1, 2, 2, q_len, k_len, 16)
    case = kernel(16, causal=True)
    check(run(case, q, k, v), q, k, v, scale=case.scale, causal=True)


def test_grouped_heads_share_keys() -> None:
    q, k, v = operands(2, 6, 2, 5, 5, 16)
    case = kernel(16, scale=0.3)
    check(run(case, q, k, v), q, k, v, scale=0.3)


def test_key_mask_and_a_sequence_that_sees_nothing() -> None:
    q, k, v = operands(3, 2, 2, 9, 18, 16)
    visible = torch.arange(18)[None, :] < torch.tensor([[18], [1], [0]])
    case = kernel(16)
    out = run(case, q, k, v, visible)
    check(out, q, k, v, visible, scale=case.scale)
    assert (out[2] == 0).all()


@pytest.mark.parametrize("shape", [(2, 2, 7, 19), (1, 2, 1, 19), (2, 1, 7, 1), (1, 1, 7, 19)])
@pytest.mark.parametrize("kind", ["float32", "boolean"])
def test_bias_of_any_broadcast_shape(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = operands(2, 2, 2, 7, 19, 16)
    bias = torch.randn(shape) if kind == "float32" else torch.rand(shape) < 0.7
    case = kernel(16, bias=kind)
    check(run(case, q, k, v, bias=bias), q, k, v, bias=bias, scale=case.scale)


def test_bias_may_hide_keys_by_minus_infinity() -> None:
    q, k, v = operands(1, 1, 1, 4, 20, 16)
    bias = torch.zeros(1, 1, 4, 20)
    bias[..., :17] = float("-inf")  # the whole first tile
    bias[:, :, 2] = float("-inf")  # one query sees nothing
    case = kernel(16, bias="float32")
    out = run(case, q, k, v, bias=bias)
    check(out, q, k, v, bias=bias, scale=case.scale)
    assert (out[:, 2] == 0).all()


def test_a_query_that_sees_nothing_is_nan_where_softmax_gives_that() -> None:
    q, k, v = operands(2, 2, 1, 3, 18, 16)
    visible = torch.arange(18)[None, :] < torch.tensor([[5], [0]])
    case = replace(kernel(16), blind_nan=True)
    out = run(case, q, k, v, visible)
    assert out[1].isnan().all()
    check(out[:1], q[:1], k[:1], v[:1], visible[:1], scale=case.scale)
    given = {"scores": q @ k.repeat_interleave(2, 1).transpose(2, 3), "key_mask": visible}
    dims = {"batch": 2, "heads": 2, "q_len": 3, "k_len": 18}
    shares = TritonRunner(Schedule(2, 32))(softmax_kernel(case, True), given, dims)["shares"]
    assert shares[1].isnan().all()
    assert shares[0].isfinite().all()
    nothing = run(case, q, k[:, :, :0], v[:, :, :0], visible[:, :0])
    assert (nothing == 0).all()  # no keys at all: a sum of nothing


def test_large_scores_do_not_overflow() -> None:
    q, k, v = operands(1, 1, 1, 4, 20, 16)
    case = kernel(16, scale=1000.0)
    check(run(case, q, k, v), q, k, v, scale=1000.0)


def test_halves_accumulate_in_float32() -> None:
    dtype = torch.float16  # the interpreter multiplies bfloat16 as if it were whole numbers
    q, k, v = operands(1, 2, 2, 8, 40, 16, dtype)
    case = kernel(16, dtype, bias="storage")
    bias = torch.randn(1, 2, 8, 40, dtype=dtype)
    check(run(case, q, k, v, bias=bias), q, k, v, bias=bias, scale=case.scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", ["none", "boolean", "float32"])
def test_softmax_between_two_gemms_is_the_same_function(causal: bool, bias: str) -> None:
    q, k, v = operands(2, 2, 2, 5, 7, 16)
    case = kernel(16, causal=causal, bias=bias)
    given = {"scores": q @ k.transpose(2, 3)}
    visible = torch.arange(7)[None, :] < torch.tensor([[7], [0]])
    given["key_mask"] = visible
    table = None
    if bias != "none":
        table = torch.rand(2, 2, 5, 7) < 0.8 if bias == "boolean" else torch.randn(2, 2, 5, 7)
        given["bias"] = table
    dims = {"batch": 2, "heads": 2, "q_len": 5, "k_len": 7}
    dims |= {"bias_batch": 70, "bias_head": 35, "bias_q": 7, "bias_k": 1}
    made = TritonRunner(Schedule(2, 8))(softmax_kernel(case, key_mask=True), given, dims)
    out = (made["shares"] @ v).permute(0, 2, 1, 3)
    check(out, q, k, v, visible, table, scale=case.scale, causal=causal)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
def test_builds_for_every_target_without_spills(dtype: torch.dtype, width: int) -> None:
    case = kernel(width, dtype)
    built = build([attention_job(case, target, key_mask=True) for target in TARGETS])
    for b in built:
        assert b.resources.spills == 0, b.resources
        assert b.resources.load_bits >= 128, b.resources


def test_builds_with_every_operand() -> None:
    case = kernel(64, torch.float16, causal=True, bias="storage")
    schedule = choose_attention_schedule(case, q_len=1)
    (built,) = build([attention_job(case, "sm_90", schedule, key_mask=True)])
    assert built.resources.spills == 0
    assert built.resources.load_bits == 128
