"""gemm.h: every epilogue at every size, against float64.

In: activations with a row stride, weights of odd sizes; out: rows written with a stride, whose
padding must stay untouched. Example: ``pytest tests/kernels/cpp/test_gemm.py``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.cpp.cpp_probe import NAMES, build, needs_compiler, pointer
from turbotx.runtime.cpu.launch_table import load_library

pytestmark = needs_compiler

SOURCE = """
#include "gemm.h"
using namespace ttx;
template <class T>
void run(const void* w, long n, long k, long stride_n, long stride_k, const void* a, long lda,
         long m, void* c, long ldc, const void* bias, int activation, const void* residual,
         long ld_residual, long gated) {
  PackedWeight<T> packed(static_cast<const T*>(w), n, k, stride_n, stride_k, gated > 0);
  Epilogue<T> finish;
  finish.bias = static_cast<const T*>(bias);
  finish.activation = static_cast<Activation>(activation);
  finish.residual = static_cast<const T*>(residual);
  finish.ld_residual = ld_residual;
  finish.gated = gated;
  linear(packed, static_cast<const T*>(a), lda, m, static_cast<T*>(c), ldc, finish);
}
"""
WRAPPER = """
extern "C" void linear_{name}(const void* w, long n, long k, long sn, long sk, const void* a,
    long lda, long m, void* c, long ldc, const void* b, int act, const void* r, long ldr,
    long gated) {{
  run<{name}>(w, n, k, sn, sk, a, lda, m, c, ldc, b, act, r, ldr, gated);
}}
"""
ACTIVATIONS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x,
    F.relu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.silu,
    torch.tanh,
]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
SIZES = [
    (1, 1, 1),
    (1, 32, 7),
    (3, 33, 64),
    (13, 100, 17),
    (2, 5, 1),
    (40, 384, 200),
    (150, 70, 33),
    (2, 65, 64),  # from here on of whole tiles of AMX in bf16
    (17, 31, 96),
    (33, 100, 160),
    (300, 40, 32),
]


@pytest.fixture(scope="module")
def gemm(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = SOURCE + "".join(WRAPPER.format(name=name) for name in NAMES.values())
    return build(source, tmp_path_factory.mktemp("gemm"))


def run_linear(
    library: ctypes.CDLL,
    a: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: int = 0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """activation(a w^T + bias) + residual, (m, n); two columns of padding are checked as well."""
    (m, k), n = a.shape, w.shape[0] // (2 if gated else 1)
    out = torch.full((m, n + 2), math.nan, dtype=a.dtype)
    longs = [ctypes.c_long(x) for x in (n, k, *w.stride(), a.stride(0), m, n + 2)]
    getattr(library, f"linear_{NAMES[a.dtype]}")(
        *(pointer(w), *longs[:4], pointer(a), *longs[4:6], pointer(out), longs[6], pointer(bias)),
        *(
            activation,
            pointer(residual),
            ctypes.c_long(residual.stride(0) if residual is not None else 0),
            ctypes.c_long(n if gated else 0),
        ),
    )
    assert out[:, n:].isnan().all(), "the padding between rows was written"
    return out[:, :n]


def largest_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got.double() - want).abs() / (1.0 + want.abs())).max())


@pytest.mark.parametrize("m, n, k", SIZES)
@pytest.mark.parametrize("dtype", NAMES)
def test_linear_with_every_epilogue(
    gemm: ctypes.CDLL, dtype: torch.dtype, m: int, n: int, k: int
) -> None:
    torch.manual_seed(m + n + k)
    a, w = torch.randn(m, k + 3).to(dtype)[:, :k], torch.randn(n, k).to(dtype)
    bias, residual = torch.randn(n).to(dtype), torch.randn(m, n + 5).to(dtype)[:, :n]
    product = a.double() @ w.double().T
    tolerance = TOLERANCE[dtype] * (math.sqrt(k) if dtype == torch.float32 else 1.0)
    for index, activation in enumerate(ACTIVATIONS):
        got = run_linear(gemm, a, w, bias, index, residual)
        want = activation(product + bias.double()) + residual.double()
        assert largest_error(got, want) <= tolerance, f"activation {index}, bias, residual"
        got = run_linear(gemm, a, w, activation=index)
        assert largest_error(got, activation(product)) <= tolerance, f"activation {index} alone"


@pytest.mark.parametrize("m, n, k", SIZES)
@pytest.mark.parametrize("dtype", NAMES)
def test_gated_linear(gemm: ctypes.CDLL, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    torch.manual_seed(m + n + k)
    a, w = torch.randn(m, k + 3).to(dtype)[:, :k], torch.randn(2 * n, k).to(dtype)
    bias, residual = torch.randn(2 * n).to(dtype), torch.randn(m, n).to(dtype)
    gate, factor = (a.double() @ w.double().T + bias.double()).chunk(2, -1)
    got = run_linear(gemm, a, w, bias, 4, residual, gated=True)
    tolerance = TOLERANCE[dtype] * 2 * (math.sqrt(k) if dtype == torch.float32 else 1.0)
    assert largest_error(got, F.silu(gate) * factor + residual.double()) <= tolerance


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("dtype", NAMES)
def test_weight_may_lie_input_by_output(gemm: ctypes.CDLL, dtype: torch.dtype, m: int) -> None:
    a, w = torch.randn(m, 45).to(dtype), torch.randn(45, 38).to(dtype)  # GPT-2's Conv1D layout
    got = run_linear(gemm, a, w.T)
    assert largest_error(got, a.double() @ w.double()) <= TOLERANCE[dtype] * math.sqrt(45)


@pytest.mark.parametrize("m", [1, 2, 10, 40])
def test_long_sums_are_as_accurate_as_torch(gemm: ctypes.CDLL, m: int) -> None:
    torch.manual_seed(m)
    a, w = torch.randn(m, 3072), torch.randn(768, 3072)
    want = a.double() @ w.double().T
    own, torchs = run_linear(gemm, a, w).double() - want, (a @ w.T).double() - want
    assert own.square().mean().sqrt() <= 1.5 * torchs.square().mean().sqrt()


def test_odd_depth_does_not_read_the_next_row(gemm: ctypes.CDLL) -> None:
    a = torch.full((2, 4), math.nan, dtype=torch.bfloat16)
    a[:, :3] = 1.0  # the column after the last is NaN, and not part of the product
    got = run_linear(gemm, a[:, :3], torch.ones(1, 3, dtype=torch.bfloat16))
    assert torch.equal(got, torch.full((2, 1), 3.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_row_stays_alone(gemm: ctypes.CDLL, value: float, dtype: torch.dtype) -> None:
    a, w = torch.randn(20, 64).to(dtype), torch.randn(40, 64).to(dtype)
    a[7, 5] = value
    got = run_linear(gemm, a, w)
    assert not got[7].isfinite().any()
    assert got[:7].isfinite().all() and got[8:].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_result_does_not_depend_on_threads(gemm: ctypes.CDLL, threads: int) -> None:
    before = torch.get_num_threads()
    load_library("runtime")  # whose threads they are
    torch.manual_seed(0)
    a, w = torch.randn(33, 256), torch.randn(300, 256)
    want = run_linear(gemm, a, w)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(run_linear(gemm, a, w), want)
    finally:
        torch.set_num_threads(before)
