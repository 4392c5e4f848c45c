"""gemm_int8_weights.h: float rows by int8 weights, few and many, on every instruction set there is.

In: float rows with a stride, int8 weights of odd sizes; out: rows written with a stride, against
float64 of the same integers. Example: ``pytest tests/kernels/cpp/test_gemm_int8_weights.py``.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cpp.cpp_probe import NAMES, needs_compiler, pointer
from tests.kernels.cpp.test_gemm_int8 import SETS, SOURCE, build_for, pack

pytestmark = needs_compiler

WRAPPER = """
extern "C" void linear_{name}(void* weight, const {name}* a, long lda, long m, const float* sw,
    {name}* c, long ldc, const {name}* bias, const {name}* r, long ldr) {{
  auto& w = *static_cast<PackedInt8*>(weight);
  Epilogue<{name}> finish{{.bias = bias, .activation = Activation::silu, .residual = r,
                          .ld_residual = ldr, .gated = w.group == 2 ? w.n : 0}};
  linear_int8_weights(w, a, lda, m, sw, c, ldc, finish);
}}
"""
SIZES = [(1, 33, 64), (1, 8, 1030), (2, 31, 5), (5, 70, 17), (12, 40, 130), (40, 31, 65),
         (300, 40, 131), (0, 4, 8)]  # fmt: skip


@pytest.fixture(scope="module", params=SETS)
def gemm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = SOURCE.replace("gemm_int8.h", "gemm_int8_weights.h")
    return build_for(request.param, source, WRAPPER, tmp_path_factory.mktemp("int8_weights"))


def check(library: ctypes.CDLL, x: torch.Tensor, w: torch.Tensor, gated: bool) -> torch.Tensor:
    """silu(scales * x w^T + bias) [* the factor] + residual: by the 1.5 x rule."""
    (m, k), n, dtype = x.shape, w.shape[0] // (2 if gated else 1), x.dtype
    scales = (torch.rand(w.shape[0]) + 0.1) / 200
    bias, residual = torch.randn(w.shape[0]).to(dtype), torch.randn(m, n + 5).to(dtype)[:, :n]
    out = torch.full((m, n + 2), math.nan, dtype=dtype)
    weight = pack(library, w, gated)
    getattr(library, f"linear_{NAMES[dtype]}")(
        weight, pointer(x), ctypes.c_long(x.stride(0)), ctypes.c_long(m), pointer(scales),
        pointer(out), ctypes.c_long(n + 2), pointer(bias), pointer(residual),
        ctypes.c_long(residual.stride(0)),
    )  # fmt: skip
    library.drop(weight)

    def made(wide: torch.dtype, products: torch.Tensor) -> torch.Tensor:
        sums = products * scales.to(wide) + bias.to(wide)
        gate = torch.nn.functional.silu(sums[:, :n]) * (sums[:, n:] if gated else 1)
        return gate + residual.to(wide)

    assert out[:, n:].isnan().all(), "the padding between rows was written"
    exact, finite = made(torch.float64, x.double() @ w.double().T), x.isfinite().all(-1)
    # Of a few numbers one order of the sums may come out exact by chance: eager's worst of some,
    # and of one number after another, as kernels without eager's partial sums add them.
    plain, turned = x.float(), w.float().T
    orders = [plain[:, order] @ turned[order] for order in (torch.randperm(k) for _ in range(8))]
    in_turn = torch.zeros_like(orders[0])
    for j in range(k):
        in_turn += plain[:, j, None] * turned[j]
    eager = torch.stack([made(torch.float32, sums).to(dtype) for sums in (*orders, in_turn)])
    if finite.any():
        allowed = 1.5 * (eager - exact)[:, finite].abs().max()
        # The residual may cancel what it is added to.
        largest = (exact.abs() + residual.abs())[finite].max()
        allowed += 2 * torch.finfo(dtype).eps * largest
        assert (out[:, :n] - exact)[finite].abs().max() <= allowed
    return out[:, :n]


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("m, n, k", SIZES)
def test_sums_keep_the_rule(gemm: ctypes.CDLL, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    torch.manual_seed(m + n + k)
    x = (torch.randn(m, k + 3) * 3).to(dtype)[:, :k]
    for gated in (False, True):
        w = torch.randint(-127, 128, (n * (1 + gated), k), dtype=torch.int8)
        check(gemm, x, w, gated)
        check(gemm, x, w.T.contiguous().T, gated)


@settings(max_examples=25)
@given(st.integers(0, 30), st.integers(1, 80), st.integers(1, 200), st.booleans(),
       st.sampled_from(list(NAMES)))  # fmt: skip
def test_any_shape(
    gemm: ctypes.CDLL, m: int, n: int, k: int, gated: bool, dtype: torch.dtype
) -> None:
    w = torch.randint(-127, 128, (n * (1 + gated), k), dtype=torch.int8)
    check(gemm, torch.randn(m, k).to(dtype), w, gated)


@pytest.mark.parametrize("m", [1, 6, 50])
def test_what_lies_behind_a_row_is_not_read(gemm: ctypes.CDLL, m: int) -> None:
    """A quad reaches past the end of a row of 5: NaN there must not come into the sums."""
    for dtype in NAMES:
        whole = torch.full((m, 9), math.nan, dtype=dtype)
        whole[:, :5] = torch.randn(m, 5).to(dtype)
        out = check(gemm, whole[:, :5], torch.randint(-127, 128, (9, 5), dtype=torch.int8), False)
        assert out.isfinite().all()


@pytest.mark.parametrize("m", [3, 40])
def test_a_row_with_nan_is_nan_and_no_other(gemm: ctypes.CDLL, m: int) -> None:
    x = torch.randn(m, 70)
    x[1, 5] = math.nan
    out = check(gemm, x, torch.randint(-127, 128, (9, 70), dtype=torch.int8), False)
    assert out.isnan().all(-1).nonzero().flatten().tolist() == [1]
