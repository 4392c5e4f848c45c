"""gemm_int8.h: exact sums and every epilogue, on every instruction set that this processor has.

In: int8 or float rows with a stride, weights of odd sizes; out: rows written with a stride, against
float64 from the same integers. Example: ``pytest tests/kernels/cpp/test_gemm_int8.py``.
"""

from __future__ import annotations

import ctypes
import math
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cpp.cpp_probe import (
    COMPILER,
    FLAGS,
    HEADERS,
    NAMES,
    build,
    needs_compiler,
    pointer,
)
from turbotx.ir.quantized_ops import MAX_DEPTH, quantize_rows, row_scale
from turbotx.kernels.processor import processor_flags

pytestmark = needs_compiler

SOURCE = """
#include "gemm_int8.h"
using namespace ttx;
extern "C" void* pack(const void* w, long n, long k, long sn, long sk, long gated) {
  return new PackedInt8(static_cast<const std::int8_t*>(w), n, k, sn, sk, gated != 0);
}
extern "C" void drop(void* w) { delete static_cast<PackedInt8*>(w); }
extern "C" long has_amx() { return detail::amx_is_usable(); }
"""
WRAPPER = """
extern "C" void linear_{name}(void* weight, const void* a, long lda, long m, const float* sa,
    const float* sw, void* c, long ldc, const void* bias, const void* r, long ldr) {{
  auto& w = *static_cast<PackedInt8*>(weight);
  Epilogue<{name}> finish{{.bias = static_cast<const {name}*>(bias), .activation = Activation::relu,
                          .residual = static_cast<const {name}*>(r), .ld_residual = ldr,
                          .gated = w.group == 2 ? w.n : 0}};
  linear_int8(w, Int8Rows{{a, lda, m, sa}}, sw, static_cast<{name}*>(c), ldc, finish);
}}
"""
# By the flag of /proc/cpuinfo that the code needs, what to compile with; "": what this one has.
SETS = {
    "": (),
    "avx512_vnni": ("-march=cascadelake",),
    "avx_vnni": ("-march=alderlake", "-mprefer-vector-width=256"),
    "avx2": ("-march=haswell", "-mprefer-vector-width=256"),
    "sse2": ("-march=x86-64",),
}
SIZES = [(1, 1, 1), (3, 33, 64), (13, 100, 17), (2, 5, 1), (40, 31, 65), (300, 40, 130), (0, 4, 8)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module", params=SETS)
def gemm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_for(request.param, SOURCE, WRAPPER, tmp_path_factory.mktemp("gemm_int8"))


def build_for(flag: str, source: str, wrapper: str, folder: Path) -> ctypes.CDLL:
    """Build with the instruction set of a flag; skip the test where the processor lacks it."""
    if flag and flag not in processor_flags():
        pytest.skip(f"this processor has no {flag}")
    source += "".join(wrapper.format(name=name) for name in NAMES.values())
    library = build(source, folder, *SETS[flag])
    library.pack.restype = ctypes.c_void_p
    return library


@pytest.mark.parametrize("flags", SETS.values(), ids=SETS)
def test_no_register_of_the_x87_unit_is_used(flags: tuple[str, ...], tmp_path: Path) -> None:
    """One that is left in use makes NaN of what PyTorch computes there later."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("for x86 processors")
    file = tmp_path / "probe.cpp"
    file.write_text(SOURCE + "".join(WRAPPER.format(name=name) for name in NAMES.values()))
    command = [str(COMPILER), *FLAGS, *flags, f"-I{HEADERS}", "-S", str(file), "-o", "-"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "mov" in text
    assert not re.search(r"%mm[0-7]|%st\b", text)


def pack(library: ctypes.CDLL, w: torch.Tensor, gated: bool) -> ctypes.c_void_p:
    """Return a packed weight, which `library.drop` frees."""
    n, k = w.shape[0] // (2 if gated else 1), w.shape[1]
    return ctypes.c_void_p(
        library.pack(pointer(w), *map(ctypes.c_long, (n, k, *w.stride(), gated)))
    )


def check(
    library: ctypes.CDLL, x: torch.Tensor, w: torch.Tensor, gated: bool, narrow: bool
) -> torch.Tensor:
    """relu(x w^T + bias) [* the factor] + residual: compared and returned; x is narrowed before, or
    by the library."""
    m, n, dtype = x.shape[0], w.shape[0] // (2 if gated else 1), x.dtype
    scales = (torch.rand(w.shape[0]) + 0.1) / 200
    bias, residual = torch.randn(w.shape[0]).to(dtype), torch.randn(m, n + 5).to(dtype)[:, :n]
    x_scale = row_scale(x)
    q = quantize_rows(x, x_scale)
    out = torch.full((m, n + 2), math.nan, dtype=dtype)
    weight = pack(library, w, gated)
    rows = q if narrow else x
    getattr(library, f"linear_{NAMES[dtype]}")(
        weight, pointer(rows), ctypes.c_long(rows.stride(0)), ctypes.c_long(m),
        pointer(x_scale if narrow else None), pointer(scales), pointer(out), ctypes.c_long(n + 2),
        pointer(bias), pointer(residual), ctypes.c_long(residual.stride(0)),
    )  # fmt: skip
    library.drop(weight)
    sums = q.double() @ w.double().T * x_scale.double() * scales.double() + bias.double()
    made = torch.relu(sums[:, :n]) * (sums[:, n:] if gated else 1) + residual.double()
    assert out[:, n:].isnan().all(), "the padding between rows was written"
    finite = x.isfinite().all(-1)
    error = (out[:, :n].double() - made)[finite].abs()
    assert (error <= TOLERANCE[dtype] * (1 + made[finite].abs().amax(-1, keepdim=True))).all()
    return out[:, :n]


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("m, n, k", SIZES)
def test_sums_are_exact(gemm: ctypes.CDLL, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    torch.manual_seed(m + n + k)
    x = (torch.randn(m, k + 3) * 3).to(dtype)[:, :k]
    for gated in (False, True):
        w = torch.randint(-127, 128, (n * (1 + gated), k), dtype=torch.int8)
        for narrow in (False, True):
            check(gemm, x, w, gated, narrow)
            check(gemm, x, w.T.contiguous().T, gated, narrow)


@settings(max_examples=25)
@given(st.integers(0, 70), st.integers(1, 80), st.integers(1, 200), st.booleans(), st.booleans())
def test_any_shape(gemm: ctypes.CDLL, m: int, n: int, k: int, gated: bool, narrow: bool) -> None:
    w = torch.randint(-127, 128, (n * (1 + gated), k), dtype=torch.int8)
    check(gemm, torch.randn(m, k), w, gated, narrow)


def test_the_largest_sums_do_not_overflow(gemm: ctypes.CDLL) -> None:
    """Offsets of the weights are in the sums on the way, which may wrap around and come back."""
    k = MAX_DEPTH
    x, w = torch.ones(2, k), torch.full((3, k), 127, dtype=torch.int8)
    x[1] = -1
    check(gemm, x, w, False, True)
    check(gemm, x, -w, False, False)


def test_rows_of_zeros_denormals_infinities_and_nan(gemm: ctypes.CDLL) -> None:
    x = torch.randn(6, 70)
    x[0], x[1], x[2, 5], x[3, 6], x[4, 7] = 0, 1e-42, math.inf, -math.inf, math.nan
    w = torch.randint(-127, 128, (9, 70), dtype=torch.int8)
    for narrow in (False, True):
        out = check(gemm, x, w, False, narrow)
        assert out[2:5].isnan().all(), "a row that holds NaN or an infinity is one of NaN"
        assert out[[0, 1, 5]].isfinite().all()


def test_half_way_rounds_to_even(gemm: ctypes.CDLL) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]])
    check(gemm, x, torch.eye(8).mul(100).to(torch.int8), False, False)
