"""gemm_int4.h: float rows by int4 weights, few and many, on every instruction set there is.

In: float rows with a stride, weights of odd sizes; out: rows written with a stride, against
float64 of the same numbers. Example: ``pytest tests/kernels/cpp/test_gemm_int4.py``.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cpp.cpp_probe import NAMES, needs_compiler, pointer
from tests.kernels.cpp.test_gemm_int8 import SETS, build_for
from turbotx.ir.int4_ops import dequantize_groups, group_scale, quantize_groups
from turbotx.runtime.packed_weight import PanelLayout, pack

pytestmark = needs_compiler

SOURCE = """
#include "gemm_int4.h"
using namespace ttx;
extern "C" void* pack(const void* w, long n, long bytes, long gated) {
  return new PackedInt4(static_cast<const std::uint8_t*>(w), n, bytes, bytes, 1, gated != 0);
}
extern "C" void drop(void* w) { delete static_cast<PackedInt4*>(w); }
extern "C" long panel_width() { return detail::kPanel; }
"""
WRAPPER = """
extern "C" void linear_{name}(void* weight, const void* scales, long group, long groups, long k,
    long wide, long shifted, const {name}* a, long lda, long m, {name}* c, long ldc,
    const {name}* bias, const {name}* r, long ldr) {{
  auto& w = *static_cast<PackedInt4*>(weight);
  Epilogue<{name}> finish{{.bias = bias, .activation = Activation::silu, .residual = r,
                          .ld_residual = ldr, .gated = w.group == 2 ? w.n : 0}};
  linear_int4(w, {{scales, group, groups, k, wide != 0, shifted != 0}}, a, lda, m, c, ldc, finish);
}}
"""
SIZES = [(1, 33, 64, 32), (1, 8, 1030, 128), (2, 31, 5, 32), (5, 70, 17, 8), (12, 40, 130, 32),
         (40, 31, 65, 64), (300, 40, 131, 32), (0, 4, 8, 32)]  # fmt: skip


@pytest.fixture(scope="module", params=SETS)
def gemm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_for(request.param, SOURCE, WRAPPER, tmp_path_factory.mktemp("int4"))


def check(
    library: ctypes.CDLL, x: torch.Tensor, floats: torch.Tensor, group: int, gated: bool = False,
    shifted: bool = False, wide: bool = False,
) -> torch.Tensor:  # fmt: skip
    """silu(x w^T + bias) [* the factor] + residual: by the 1.5 x rule."""
    (m, k), n, dtype = x.shape, floats.shape[0] // (2 if gated else 1), x.dtype
    scale = group_scale(floats, group, shifted)
    if wide:  # no number of bfloat16
        scale = scale * 1.0123
    numbers = quantize_groups(floats, scale, group)
    w = dequantize_groups(numbers, scale.double(), k)
    bias, residual = torch.randn(len(w)).to(dtype), torch.randn(m, n + 5).to(dtype)[:, :n]
    out = torch.full((m, n + 2), math.nan, dtype=dtype)
    flat = scale.flatten(1).to(torch.float32 if wide else torch.bfloat16)
    panels = pack(flat, PanelLayout(library.panel_width(), 1), gated)
    sizes = n, numbers.shape[1], gated
    weight = ctypes.c_void_p(library.pack(pointer(numbers), *map(ctypes.c_long, sizes)))
    said = map(ctypes.c_long, (group, scale.shape[1], k, wide, shifted))
    getattr(library, f"linear_{NAMES[dtype]}")(
        weight, pointer(panels), *said, pointer(x), ctypes.c_long(x.stride(0)), ctypes.c_long(m),
        pointer(out), ctypes.c_long(n + 2), pointer(bias), pointer(residual),
        ctypes.c_long(residual.stride(0)),
    )  # fmt: skip
    library.drop(weight)

    def made(wide: torch.dtype, order: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        sums = x[:, order].to(wide) @ w[:, order].to(wide).T + bias.to(wide)
        gate = torch.nn.functional.silu(sums[:, :n]) * (sums[:, n:] if gated else 1)
        return gate + residual.to(wide)

    assert out[:, n:].isnan().all(), "the padding between rows was written"
    exact, finite = made(torch.float64), x.isfinite().all(-1)
    # Of a few numbers one order of the sums may come out exact by chance: eager's worst of some.
    few = exact.numel() <= 64
    orders = 100 if few else 8
    eager = torch.stack([made(torch.float32, torch.randperm(k)).to(dtype) for _ in range(orders)])
    if finite.any():
        allowed = (2 if few else 1.5) * (eager - exact)[:, finite].abs().max()
        # The residual may cancel what it is added to.
        largest = (exact.abs() + residual.abs())[finite].max()
        allowed += 2 * torch.finfo(dtype).eps * largest
        assert (out[:, :n] - exact)[finite].abs().max() <= allowed
    return out[:, :n]


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("m, n, k, group", SIZES)
def test_sums_keep_the_rule(
    gemm: ctypes.CDLL, dtype: torch.dtype, m: int, n: int, k: int, group: int
) -> None:
    torch.manual_seed(m + n + k)
    x = (torch.randn(m, k + 3) * 3).to(dtype)[:, :k]
    for gated in (False, True):
        w = torch.randn(n * (1 + gated), k)
        check(gemm, x, w, group, gated)
        check(gemm, x, w + 0.5, group, gated, shifted=True, wide=gated)


@settings(max_examples=25)
@given(st.integers(0, 30), st.integers(1, 80), st.integers(1, 200), st.booleans(), st.booleans())
def test_any_shape(gemm: ctypes.CDLL, m: int, n: int, k: int, gated: bool, shifted: bool) -> None:
    check(gemm, torch.randn(m, k), torch.randn(n * (1 + gated), k), 32, gated, shifted)


@pytest.mark.parametrize("m", [1, 6, 50])
def test_what_lies_behind_a_row_is_not_read(gemm: ctypes.CDLL, m: int) -> None:
    """A group reaches past the end of a row of 5: NaN there must not come into the sums."""
    for dtype in NAMES:
        whole = torch.full((m, 40), math.nan, dtype=dtype)
        whole[:, :5] = torch.randn(m, 5).to(dtype)
        assert check(gemm, whole[:, :5], torch.randn(9, 5), 32, shifted=True).isfinite().all()


@pytest.mark.parametrize("m", [3, 40])
def test_a_row_with_nan_is_nan_and_no_other(gemm: ctypes.CDLL, m: int) -> None:
    x = torch.randn(m, 70)
    x[1, 5] = math.nan
    out = check(gemm, x, torch.randn(9, 70), 32)
    assert out.isnan().all(-1).nonzero().flatten().tolist() == [1]
