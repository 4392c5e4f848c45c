"""Runs printed Triton attention, and its two products, in Triton's interpreter.

In: an `AttentionKernel` or a `ProductKernel` and operands of any strides. Out: what it stores, and
checks against the ops' own meaning in float64, for example::

    q, k, v = operands(2, 4, 4, 7, 7, 16)
    check(run(kernel, q, k, v), q, k, v, scale=kernel.scale)
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.kernels.triton.triton_runner import interpreting, load_function
from turbotx.ir.attention_ops import attention, attention_scores, attention_values
from turbotx.ir.matmul_kernels import AttentionKernel, ProductKernel
from turbotx.kernels.schedule import power_above
from turbotx.kernels.triton.attention import (
    AttentionSchedule,
    attention_grid,
    print_triton_attention,
)
from turbotx.kernels.triton.products import (
    ProductSchedule,
    print_triton_product,
    product_grid,
)

SMALL = AttentionSchedule(q_tile=16, k_tile=16)
# Whether `run` takes the form without a loop.
ONCE = False


def run(kernel, q, k, v, keys=None, bias=None, sinks=None, schedule=None, peaks=None):
    """Run the printed kernel over operands of any strides; out is (batch, q_len, heads, dim)."""
    if schedule is None:
        k_tile = max(16, power_above(k.shape[2]))
        schedule = AttentionSchedule(16, k_tile, once=1) if ONCE else SMALL
    batch, heads, q_len, width = q.shape
    out = torch.full((batch, q_len, heads, width), float("nan"), dtype=q.dtype)
    if keys is not None:
        kernel = replace(kernel, keys="mask" if keys.dtype is torch.bool else "lengths")
    left = peaks if kernel.peaks else None
    pointers = [t for t in (q, k, v, out, keys, bias, sinks, left) if t is not None]
    sizes = [batch, heads, k.shape[1], q_len, k.shape[2]]
    for t in (q, k, v):
        sizes += t.stride()[:3]
    sizes += [out.stride(0), out.stride(2), out.stride(1)]
    sizes.append(keys.stride(0) if kernel.keys == "mask" else 0)
    full = None if bias is None else bias.expand(batch, heads, q_len, k.shape[2])
    sizes += [0] * 4 if full is None else full.stride()
    launch(
        print_triton_attention(kernel, schedule), kernel.name,
        attention_grid(schedule, batch, heads, q_len), (*pointers, *sizes),
        {"Q_TILE": schedule.q_tile, "K_TILE": schedule.k_tile},
    )  # fmt: skip
    return out


def launch(source, name, grid, args, tiles):
    if 0 not in grid:
        with interpreting():
            load_function(source, name)[grid](*args, **tiles)


def multiply(kernel, a, b):
    """Run one of attention's products in the interpreter."""
    schedule = ProductSchedule(16, 16, 16)
    batch, heads, q_len, _ = a.shape
    k_len, width = b.shape[2], b.shape[3]
    if kernel.which == "scores":
        out = torch.full((batch, heads, q_len, k_len), float("nan"))
    else:
        out = torch.full((batch, q_len, heads, width), float("nan"), dtype=b.dtype)
    steps = out.transpose(1, 2).stride() if kernel.which == "values" else out.stride()
    sizes = [batch, heads, b.shape[1], q_len, k_len]
    sizes += [*a.stride()[:3], *b.stride()[:3], *steps[:3]]
    tiles = {"M_TILE": schedule.m_tile, "N_TILE": schedule.n_tile, "K_TILE": schedule.k_tile}
    grid = product_grid(kernel, schedule, batch, heads, q_len, k_len)
    source = print_triton_product(kernel, schedule)
    launch(source, kernel.name, grid, (a, b, out, *sizes), tiles)
    return out


def operands(batch, heads, kv_heads, q_len, k_len, width, dtype=torch.float32):
    """q, k and v as windows on one packed GEMM output where the lengths allow it."""
    if q_len == k_len:
        packed = torch.randn(batch, q_len, heads + 2 * kv_heads, width, dtype=dtype)
        pieces = packed.split([heads, kv_heads, kv_heads], dim=2)
        return [p.transpose(1, 2) for p in pieces]
    shapes = [(heads, q_len), (kv_heads, k_len), (kv_heads, k_len)]
    return [torch.randn(batch, h, n, width, dtype=dtype) for h, n in shapes]


def check(out, q, k, v, keys=None, bias=None, sinks=None, **said):
    if keys is not None and keys.dtype is torch.bool:
        keys = keys[:, None, None, :]
    exact_bias = bias.double() if bias is not None and bias.is_floating_point() else bias
    exact = attention(q.double(), k.double(), v.double(), keys, exact_bias, sinks, **said)
    own = attention(q, k, v, keys, bias, sinks, **said).double()
    assert out.shape == exact.shape
    assert torch.equal(out.isnan(), exact.isnan())
    allowed = 2 * (own - exact).nan_to_num().abs().max() + 4 * torch.finfo(q.dtype).eps
    assert (out.double() - exact).nan_to_num().abs().max() <= allowed


def check_attention(kernel: AttentionKernel, length: int = 19) -> None:
    """Run a kernel over random operands with everything that it may be given."""
    q, k, v = operands(3, 2, 2, length, length, kernel.head_dim, kernel.dtype)
    counts = torch.tensor([length, 1, 0])
    keys = {
        "all": None, "lengths": counts, "mask": torch.arange(length)[None] < counts[:, None],
    }[kernel.keys]  # fmt: skip
    biases = {"boolean": torch.bool, "float32": torch.float32, "storage": kernel.dtype}
    bias = torch.randn(1, 2, length, length)
    if kernel.bias != "none":
        bias = bias > -0.5 if kernel.bias == "boolean" else bias.to(biases[kernel.bias])
    sinks = torch.randn(2) if kernel.sinks else None
    given = (keys, bias if kernel.bias != "none" else None, sinks)
    said = {"scale": kernel.scale, "causal": kernel.causal, "window": kernel.window}
    out = run(kernel, q, k, v, *given)
    said |= {"blind_nan": kernel.blind_nan, "blind_mean": kernel.blind_mean}
    check(out, q, k, v, *given, **said, softcap=kernel.softcap)


def check_product(kernel: ProductKernel, length: int = 19) -> None:
    """Run one of attention's products over random operands, and compare with float64."""
    q, k, v = operands(2, 4, 2, length, length, kernel.head_dim, kernel.dtype)
    if kernel.which == "scores":
        out, exact = multiply(kernel, q, k), attention_scores(q.double(), k.double())
    else:
        shares = attention_scores(q, k).softmax(-1).to(kernel.dtype)
        out, exact = multiply(kernel, shares, v), attention_values(shares.double(), v.double())
    eps = torch.finfo(out.dtype).eps
    assert out.shape == exact.shape
    assert (out - exact).abs().max() <= 16 * eps * exact.abs().max()
