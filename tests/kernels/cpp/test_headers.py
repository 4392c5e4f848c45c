"""vecmath.h and storage.h, compiled and called over floats of every kind.

In: a 4,097th of all float32 values and the edges; out: the worst error in units of the last place,
held against float64. Example: ``pytest tests/kernels/cpp/test_headers.py -k erf``.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch

from tests.kernels.cpp.cpp_probe import build, needs_compiler, pointer

pytestmark = needs_compiler

# --- vecmath.h -----------------------------------------------------------------------------------

ERRORS_ULP = {  # function: (float64 meaning, bound in ulp, lowest argument the bound holds for)
    "exp": (torch.exp, 1.1, -math.inf),
    "exp2": (torch.exp2, 1.0, -math.inf),
    "expm1": (torch.expm1, 1.5, -math.inf),
    "log": (torch.log, 1.0, -math.inf),
    "log2": (torch.log2, 1.0, -math.inf),
    "log1p": (torch.log1p, 1.5, -math.inf),
    "erf": (torch.erf, 2.0, -math.inf),
    "tanh": (torch.tanh, 2.5, -math.inf),
    "sigmoid": (torch.sigmoid, 2.5, -math.inf),
    "silu": (torch.nn.functional.silu, 3.2, -85.0),
    "softplus": (lambda x: torch.logaddexp(x, torch.zeros_like(x)), 1.7, -math.inf),
    "gelu": (lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2.0)), 3.0, -1.0),
    "gelu_tanh": (lambda x: x / (1 + torch.exp(-_gelu_tanh_argument(x))), 9.0, -2.0),
    "sin": (torch.sin, 1.6, -math.inf),
    "cos": (torch.cos, 1.6, -math.inf),
    "sqrt": (torch.sqrt, 0.51, -math.inf),
    "rsqrt": (torch.rsqrt, 1.5, -math.inf),
}
POWERS = (2.7, -3.0, 0.3, 2.0, -0.5)


def _gelu_tanh_argument(x: torch.Tensor) -> torch.Tensor:
    return 2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x.double() * torch.special.erfc(-x.double() / math.sqrt(2.0))


def errors_in_ulp(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Distance in units of the last place of `want`; 0 where both are the same, infinite or NaN."""
    rounded = want.float()
    _, exponent = torch.frexp(want)
    unit = torch.ldexp(torch.ones_like(want), torch.clamp(exponent - 24, min=-149))
    distance = (got.double() - want).abs() / unit
    same = (got == rounded) | (got.isnan() & want.isnan())
    return torch.where(same, torch.zeros_like(distance), torch.nan_to_num(distance, nan=math.inf))


@pytest.fixture(scope="module")
def vecmath(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loop = """
extern "C" void loop_{name}(const float* __restrict x, float* __restrict y, long n, float p) {{
  (void)p;
#pragma omp simd
  for (long i = 0; i < n; ++i) y[i] = ttx::{name}(x[i]{extra});
}}
"""
    names = [(name, "") for name in ERRORS_ULP] + [("pow", ", p"), ("gelu_for_bf16", "")]
    source = '#include "vecmath.h"\n'
    source += "namespace ttx { inline float gelu_for_bf16(float x) { return gelu<12>(x); } }\n"
    source += "".join(loop.format(name=n, extra=e) for n, e in names)
    source += """
extern "C" void power(float base, const float* y, float* out, long n) {
  for (long i = 0; i < n; ++i) out[i] = ttx::pow(base, y[i]);
}
"""
    return build(source, tmp_path_factory.mktemp("vecmath"))


def apply(library: ctypes.CDLL, name: str, x: torch.Tensor, parameter: float = 0.0) -> torch.Tensor:
    y = torch.empty_like(x)
    function = getattr(library, f"loop_{name}")
    function(pointer(x), pointer(y), ctypes.c_long(x.numel()), ctypes.c_float(parameter))
    return y


def every_kind_of_float() -> torch.Tensor:
    """A 4,097th of all floats (denormals, infinities, NaN included) and a fine grid near zero."""
    sample = torch.from_numpy(np.arange(0, 2**32, 4097, dtype=np.uint64).astype(np.uint32))
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e-45, 3.4028235e38])
    return torch.cat([sample.view(torch.float32), edges, torch.linspace(-12, 12, 200_001)])


@pytest.mark.parametrize("name", ERRORS_ULP)
def test_function_is_within_its_stated_ulps(vecmath: ctypes.CDLL, name: str) -> None:
    meaning, bound, lowest = ERRORS_ULP[name]
    x = every_kind_of_float()
    x = x[~(x < lowest)]
    if name.startswith("gelu"):
        x = x[x != math.inf]
    error = errors_in_ulp(apply(vecmath, name, x), meaning(x.double()))
    worst = int(error.argmax())
    assert error[worst] <= bound, f"{name}({x[worst].item()!r}) is off by {error[worst]:.2f} ulp"


@pytest.mark.parametrize("name", ["expm1", "log1p", "erf", "tanh", "sin", "sqrt", "gelu", "silu"])
def test_negative_zero_stays(vecmath: ctypes.CDLL, name: str) -> None:
    assert math.copysign(1.0, apply(vecmath, name, torch.tensor([-0.0])).item()) == -1.0


def test_gelu_at_infinities_and_in_its_tail(vecmath: ctypes.CDLL) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan])
    got = apply(vecmath, "gelu", x)
    assert got[0] == math.inf and got[1].isnan() and got[2].isnan()  # as torch answers
    x = torch.linspace(-40.0, -1.0, 100_001)
    error = (apply(vecmath, "gelu", x).double() - exact_gelu(x)).abs()
    assert (error <= 2.0**-24 * x.abs()).all()
    assert (apply(vecmath, "gelu", torch.tensor([-15.0, -1e6, -3e38])) == 0.0).all()


def test_gelu_for_bfloat16(vecmath: ctypes.CDLL) -> None:
    x = every_kind_of_float()
    x = x[(x >= -5.5) & (x != math.inf) & ((x.abs() > 1e-30) | (x == 0.0))]
    got, want = apply(vecmath, "gelu_for_bf16", x), exact_gelu(x)
    assert ((got.double() - want).abs() <= 2.0**-11.3 * want.abs()).all()  # a rounding has 2^-9
    assert apply(vecmath, "gelu_for_bf16", torch.tensor([math.inf])).item() == math.inf
    below = apply(vecmath, "gelu_for_bf16", torch.linspace(-40.0, -5.5, 10_001))
    assert (below <= 0.0).all() and (below >= -1.1e-7).all()
    assert (apply(vecmath, "gelu_for_bf16", torch.tensor([-15.0, -1e6, -3e38])) == 0.0).all()


@pytest.mark.parametrize("exponent", POWERS)
def test_pow_of_every_base(vecmath: ctypes.CDLL, exponent: float) -> None:
    x = every_kind_of_float()
    y = float(np.float32(exponent))
    with np.errstate(all="ignore"):
        want = torch.from_numpy(np.power(x.double().numpy(), y))
    error = errors_in_ulp(apply(vecmath, "pow", x, y), want)
    assert error.max() <= 0.6


def test_pow_at_its_edges(vecmath: ctypes.CDLL) -> None:
    edge = [0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 3.0, math.inf, -math.inf, math.nan, 2.5, 16777217.0]
    y = torch.tensor(edge)
    for base in edge:
        got = torch.empty_like(y)
        vecmath.power(ctypes.c_float(base), pointer(y), pointer(got), ctypes.c_long(len(y)))
        with np.errstate(all="ignore"):
            want = torch.from_numpy(np.power(np.float32(base), y.numpy()))
        torch.testing.assert_close(got, want, equal_nan=True, msg=lambda m, b=base: f"{b}: {m}")
        assert (got.signbit() == want.signbit())[~want.isnan()].all(), base


# --- storage.h -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = '#include "simd.h"\nusing namespace ttx;\n'
    for name in ("bf16", "f16"):
        source += f"""
extern "C" void store_{name}(const float* __restrict x, {name}* __restrict y, long n) {{
#pragma omp simd
  for (long i = 0; i < n; ++i) store(y + i, x[i]);
}}
extern "C" void load_{name}(const {name}* __restrict x, float* __restrict y, long n) {{
#pragma omp simd
  for (long i = 0; i < n; ++i) y[i] = load(x + i);
}}
extern "C" void copy_{name}(const {name}* x, {name}* y, long n) {{
  for (long i = 0; i < n; i += kLanes) store_vec(y + i, load_vec(x + i));
}}
"""
    return build(source, tmp_path_factory.mktemp("storage"))


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_sixteen_bit_floats_round_as_torch_does(
    storage: ctypes.CDLL, name: str, dtype: torch.dtype
) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(every.numel())
    getattr(storage, f"load_{name}")(pointer(every), pointer(wide), ctypes.c_long(every.numel()))
    assert torch.equal(torch.nan_to_num(wide), torch.nan_to_num(every.float()))
    assert torch.equal(wide.isnan(), every.isnan())

    halfway = (wide[1:] + wide[:-1]) / 2  # ties, and the midpoints past the largest number
    x = torch.cat([every_kind_of_float(), wide, halfway])
    got = torch.empty(x.numel(), dtype=dtype)
    getattr(storage, f"store_{name}")(pointer(x), pointer(got), ctypes.c_long(x.numel()))
    want, known = x.to(dtype), ~x.isnan()
    assert torch.equal(got[known].view(torch.int16), want[known].view(torch.int16))
    assert got[~known].isnan().all()

    back = torch.empty_like(every)
    getattr(storage, f"copy_{name}")(pointer(every), pointer(back), ctypes.c_long(every.numel()))
    number = ~every.isnan()
    assert torch.equal(back[number].view(torch.int16), every[number].view(torch.int16))
    assert back[~number].isnan().all()
