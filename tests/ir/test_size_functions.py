"""Functions of sizes: every one that PyTorch's symbolic shapes know has a row, and means the same
in Python, in JavaScript, to torch's own symbols, and where a kernel is given its value."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
import torch.utils._sympy.functions as functions
from torch.utils._sympy.functions import (
    CeilToInt,
    FloatPow,
    FloatTrueDiv,
    FloorDiv,
    FloorToInt,
    IntTrueDiv,
    Max,
    Min,
    Mod,
    PowByNatural,
    PythonMod,
    RoundDecimal,
    RoundToInt,
    ToFloat,
    TruncToFloat,
    TruncToInt,
)

import turbotx
from turbotx.errors import VerifyError
from turbotx.ir.expr import (
    compile_evaluator,
    dim,
    evaluate,
    is_nonnegative,
    name_functions,
    spell_out,
    to_c,
    to_javascript,
    to_python,
)
from turbotx.ir.size_functions import FUNCTIONS, power
from turbotx.saved.values import check_texts

S = dim("seq")
X = ToFloat(S)
Three = sympy.Integer(3)

# Classes that rewrite themselves into others, or are asked of strides and never a size.
NO_SIZES = {"CeilDiv", "LShift", "RShift", "MinMaxBase", "IsNonOverlappingAndDenseIndicator"}

# An expression of one size, and what Python makes of it.
CASES: dict[str, tuple[Any, Callable[[int], Any]]] = {
    "FloorDiv": (FloorDiv(S, 3), lambda n: n // 3),
    "CleanDiv": (functions.CleanDiv(6 * S * S + 6, S + 1), lambda n: (6 * n * n + 6) // (n + 1)),
    "Mod": (Mod(S, 3), lambda n: n % 3),
    "PythonMod": (PythonMod(-S, 3), lambda n: -n % 3),
    "ModularIndexing": (functions.ModularIndexing(S, 2, 3), lambda n: n // 2 % 3),
    "PowByNatural": (PowByNatural(Three, S), lambda n: 3**n),
    "Max": (Max(S, 3), lambda n: max(n, 3)),
    "Min": (Min(S, 3), lambda n: min(n, 3)),
    "Abs": (sympy.Abs(S - 4), lambda n: abs(n - 4)),
    "BitwiseFn_bitwise_and": (functions.BitwiseFn_bitwise_and(S, Three), lambda n: n & 3),
    "BitwiseFn_bitwise_or": (functions.BitwiseFn_bitwise_or(S, Three), lambda n: n | 3),
    "BitwiseFn_bitwise_xor": (functions.BitwiseFn_bitwise_xor(S, Three), lambda n: n ^ 3),
    "FloorToInt": (FloorToInt(0.3 * X), lambda n: math.floor(0.3 * n)),
    "CeilToInt": (CeilToInt(IntTrueDiv(S, 4)), lambda n: math.ceil(n / 4)),
    "TruncToInt": (TruncToInt(-0.3 * X), lambda n: math.trunc(-0.3 * n)),
    "RoundToInt": (RoundToInt(0.5 * X), lambda n: round(0.5 * n)),
    "floor": (sympy.floor(S / 3), lambda n: n // 3),
    "ceiling": (sympy.ceiling(S / 3), lambda n: -(-n // 3)),
    "ToFloat": (X, float),
    "TruncToFloat": (TruncToFloat(0.7 * X), lambda n: float(math.trunc(0.7 * n))),
    "RoundDecimal": (RoundDecimal(0.123 * X, sympy.Integer(2)), lambda n: round(0.123 * n, 2)),
    "IntTrueDiv": (IntTrueDiv(Three, S), lambda n: 3 / n),
    "FloatTrueDiv": (FloatTrueDiv(X, 7.0), lambda n: n / 7.0),
    "FloatPow": (FloatPow(X, 0.5), lambda n: n**0.5),
    "Where": (functions.Where(S > 3, S, Three), lambda n: n if n > 3 else 3),
    "Identity": (functions.Identity(S + 1), lambda n: n + 1),
}
for _name in (n for n in FUNCTIONS if n.startswith("OpaqueUnaryFn_")):
    _exact = getattr(math, _name.removeprefix("OpaqueUnaryFn_"))
    CASES[_name] = (
        getattr(functions, _name)(FloatTrueDiv(X, 16.0)),
        lambda n, exact=_exact: exact(n / 16.0),
    )
SIZES = (1, 2, 3, 4, 5, 7, 10, 13, 16)


def test_every_function_of_torch_has_a_row_and_a_case() -> None:
    classes = [c for _, c in inspect.getmembers(functions, inspect.isclass)]
    own = {c.__name__ for c in classes if issubclass(c, sympy.Basic) and "torch" in c.__module__}
    assert own - NO_SIZES <= set(FUNCTIONS)
    assert set(CASES) == set(FUNCTIONS)


@pytest.mark.parametrize("name", CASES)
def test_python_gives_what_python_gives(name: str) -> None:
    value, right = CASES[name]
    check_texts([to_python(value)], ["seq"])  # as what loads a file asks of it
    run = compile_evaluator([value], ["seq"])
    found = [run(n)[0] for n in SIZES]
    assert found == [right(n) for n in SIZES]
    assert {type(x) for x in found} == {type(right(n)) for n in SIZES}


@pytest.mark.parametrize("name", CASES)
def test_the_row_s_function_is_the_text(name: str) -> None:
    row, given = FUNCTIONS[name], CASES[name][0]
    if type(given).__name__ != name or name in ("FloorDiv", "Where"):
        return
    for n in SIZES:
        args = compile_evaluator(list(given.args), ["seq"])(n)
        assert row.call(*args) == CASES[name][1](n)


@pytest.mark.skipif(shutil.which("node") is None, reason="runs JavaScript in node")
def test_javascript_gives_the_same() -> None:
    texts = [to_javascript(value) for value, _ in CASES.values()]
    lists = ",".join(f"[{','.join(texts)}]".replace("seq", str(n)) for n in SIZES)
    made = subprocess.run(
        ["node", "-e", f"console.log(JSON.stringify([{lists}]))"], capture_output=True, check=True
    )
    for n, found in zip(SIZES, json.loads(made.stdout), strict=True):
        for name, value in zip(CASES, found, strict=True):
            assert value == pytest.approx(CASES[name][1](n), rel=1e-12, abs=1e-12), (name, n)


def test_infinities_are_python_s_and_javascript_s() -> None:
    values = [sympy.oo * (S - 1.0), -sympy.oo, sympy.nan]
    check_texts(list(map(to_python, values)), ["seq"])
    found = [compile_evaluator(values, ["seq"])(n) for n in (1, 2)]
    assert str(found) == "[(nan, -inf, nan), (inf, -inf, nan)]"
    assert [to_javascript(v) for v in values[1:]] == ["(-Infinity)", "NaN"]


def test_a_relation_is_a_bool_in_both() -> None:
    value = sympy.And(sympy.Eq(S, 4), sympy.Or(S > 1, sympy.Not(S >= 9)), sympy.Ne(S, 5))
    assert [compile_evaluator([value], ["seq"])(n)[0] for n in (3, 4)] == [False, True]
    assert to_javascript(sympy.Eq(S, 4)) == "(seq === 4)"
    choice = sympy.Piecewise((S, S > 2), (Three, True))
    assert [compile_evaluator([choice], ["seq"])(n)[0] for n in (1, 4)] == [3, 4]


def test_digits_of_a_float_are_all_printed() -> None:
    assert to_python(sympy.Float(0.1 + 0.2) * X) == "0.30000000000000004 * float(seq)"


def test_kernels_see_a_name_that_stands_for_the_function() -> None:
    value = 2 * RoundToInt(0.3 * X) + S
    named = name_functions(value)
    (whole,) = (s for s in named.free_symbols if s != S)
    assert to_c(named) == f"{whole.name} * 2 + seq"
    assert spell_out(named) == value and dim(whole.name) == whole
    assert [evaluate(named, {"seq": n}) for n in SIZES] == [2 * round(0.3 * n) + n for n in SIZES]
    assert compile_evaluator([named], ["seq"])(5) == (9,)
    with pytest.raises(VerifyError, match="no spelling in kernels"):
        to_c(value)


def test_integers_that_kernels_compute_stay() -> None:
    value = FloorDiv(S, 2) + Max(S, 3) + Mod(S, 5)
    assert name_functions(value) == value


def test_signs_of_named_functions() -> None:
    above, below = (name_functions(FloorToInt(c * X)) for c in (0.5, -0.5))
    assert is_nonnegative(above) and not is_nonnegative(above - 1)  # floor(0.5 * 1) is 0
    assert not is_nonnegative(below) and not is_nonnegative(below + S)


def test_a_saved_power_is_bounded() -> None:
    with pytest.raises(OverflowError):
        power(9, 9**9)


MODELS: dict[str, Callable[[torch.Tensor], Any]] = {
    "ceil": lambda x: x * math.ceil(x.shape[1] / 3),
    "round": lambda x: x[:, round(x.shape[1] * 0.4) :].exp(),
    "trunc of a root": lambda x: x.new_zeros(x.shape[1], math.trunc(x.shape[1] ** 0.5)) + x.sum(),
    "power": lambda x: x + 3 ** x.shape[1],
    "bits": lambda x: x * (x.shape[1] & 6) + (x.shape[1] << 1),
    "decimal": lambda x: x * round(x.shape[1] * 0.123, 1),
    "padded": lambda x: F.pad(x, (0, math.ceil(x.shape[1] / 4) * 4 - x.shape[1])).view(-1, 4),
    "outputs": lambda x: (x + 1, x.shape[1] / 3, x.shape[0] == x.shape[1], 2 ** x.shape[1]),
}


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_compute_sizes_through_floats(name: str, backend: str) -> None:
    fast = turbotx.optimize(MODELS[name], backend=backend)
    for n in (5, 2, 9, 12):
        x = torch.randn(2, n)
        torch.testing.assert_close(fast(x), MODELS[name](x))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_by_a_factor(mode: str, antialias: bool) -> None:
    if antialias and mode == "nearest":
        return

    def model(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=1.5, mode=mode, antialias=antialias)

    fast = turbotx.optimize(model)
    for height in (6, 9):
        x = torch.randn(1, 2, height, 7)
        torch.testing.assert_close(fast(x), model(x))
    assert fast.stats()["captures"] == 1
