"""Compiled kernels against float64: every length, dtype and kind of row, by the project's rule.

In: functions of one tensor, captured once per dtype and run at many shapes. Out: the error of the
printed C++, at most 1.5 x eager's own plus 2 ulp, for example::

    layer_norm of rows with mean 1e4 and std 1, of length 4097, in bfloat16
"""

from __future__ import annotations

import pytest
import torch

from tests.compiled_functions import Compilation, CppRunner, by_interpreter, compile_function
from tests.kernel_interpreter import CheckFailed
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.ops.operator_samples import excess

pytestmark = needs_compiler
LENGTHS = (1, 2, 3, 31, 33, 1000, 4097, 70000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def over_last(x: torch.Tensor) -> list[torch.Tensor]:
    normal = torch.nn.functional.layer_norm(x, (x.shape[-1],))
    squares = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    away = x - x.mean(-1, keepdim=True)
    by_hand = away * torch.rsqrt(away.pow(2).mean(-1, keepdim=True) + 1e-6)
    return [normal, by_hand, squares, x.softmax(-1), x.log_softmax(-1), x.sum(-1), x.mean(-1),
            x.var(-1, correction=0), x.amax(-1), x.argmin(-1),
            torch.nn.functional.rms_norm(x, (x.shape[-1],), eps=1e-6), x.norm(dim=-1),
            x.logsumexp(-1), (x > 0).any(-1), (x > 0).all(-1), x.argmax(-1),
            x.cumsum(-1)]  # fmt: skip


def over_first(x: torch.Tensor) -> list[torch.Tensor]:
    return [x.sum(0), x.mean(0), x.softmax(0), x.std(0, correction=0), x.amin(0), x.argmax(0),
            x.norm(dim=0), x.log_softmax(0), x.cumsum(0), (x > 0).any(0),
            x.sum(0) / torch.ones_like(x, dtype=torch.long).sum(0)]  # fmt: skip


CASES = {f"last-{dtype}": (over_last, dtype) for dtype in DTYPES} | {
    f"first-{dtype}": (over_first, dtype) for dtype in DTYPES[:2]
}


@pytest.fixture(scope="module")
def compiled() -> tuple[dict[str, Compilation], CppRunner]:
    made = {
        name: compile_function(function, torch.randn(3, 5).to(dtype))
        for name, (function, dtype) in CASES.items()
    }
    return made, CppRunner(made.values())


def rows_of(kind: str, length: int, count: int = 3) -> torch.Tensor:
    x = torch.randn(count, length, dtype=torch.float64)
    if kind == "large mean":
        return x + 1e4
    if kind == "hidden":  # rows of -inf, wholly and in part
        x[0] = -torch.inf
        x[1, : length // 2] = -torch.inf
    if kind == "nan":
        x[1, length // 2] = torch.nan
    return x


def check(name: str, compiled: tuple[dict[str, Compilation], CppRunner], x: torch.Tensor) -> None:
    function, dtype = CASES[name]
    x = x.to(dtype)
    made, runner = compiled
    outputs = made[name].run((x,), runner)
    wide = function(x.double())
    for k, (ours, eager, true) in enumerate(zip(outputs, function(x), wide, strict=True)):
        if dtype is torch.float64:  # eager is the reference: nothing to compare errors with
            torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-10, equal_nan=True)
        else:
            assert excess(ours, eager, true) is None, f"output {k}: {excess(ours, eager, true)}"


@pytest.mark.parametrize("kind", ["normal", "large mean", "hidden", "nan"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_reductions(
    name: str, length: int, kind: str, compiled: tuple[dict[str, Compilation], CppRunner]
) -> None:
    x = rows_of(kind, length)
    check(name, compiled, x.T.contiguous() if name.startswith("first") else x)


@pytest.mark.parametrize("kind", ["large mean", "hidden", "nan"])
@pytest.mark.parametrize("width", [128, 390, 768])
def test_norms_of_a_known_width(width: int, kind: str) -> None:
    """Of which 128 and 768 are summed in blocks."""

    def norms(x: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        x = x + b
        away = x - x.mean(-1, keepdim=True)
        return [torch.nn.functional.layer_norm(x, (width,)), x.var(-1), x.std(-1, correction=0),
                away / torch.sqrt(away.square().mean(-1, keepdim=True) + 1e-5)]  # fmt: skip

    x, b = rows_of(kind, width, 9).float(), torch.zeros(width)
    made = compile_function(norms, x, b)
    outputs = made.run((x, b), CppRunner([made]))
    trues = norms(x.double(), b.double())
    for k, (ours, own, true) in enumerate(zip(outputs, norms(x, b), trues, strict=True)):
        assert excess(ours, own, true) is None, f"output {k}: {excess(ours, own, true)}"


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_default_eps_of_rms_norm_is_that_of_float32(dtype: torch.dtype) -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (4,))

    x = torch.full((3, 4), 0.05).to(dtype)
    made = compile_function(norm, x)
    (ours,) = made.run((x,), CppRunner([made]))
    assert torch.equal(ours, norm(x))


@pytest.mark.parametrize("name", CASES)
def test_strided_and_empty_inputs(
    name: str, compiled: tuple[dict[str, Compilation], CppRunner]
) -> None:
    check(name, compiled, torch.randn(37, 9, dtype=torch.float64).T)
    check(name, compiled, torch.randn(6, 40, dtype=torch.float64)[::2, 1::3])
    function, dtype = CASES[name]
    empty = torch.empty(0, 7) if name.startswith("last") else torch.empty(7, 0)
    alone = compile_function(function, empty.to(dtype))  # a size of 0 has a capture of its own
    check(name, ({name: alone}, CppRunner([alone])), empty)


@pytest.mark.parametrize("name", CASES)
def test_meaning_of_the_kernels(
    name: str, compiled: tuple[dict[str, Compilation], CppRunner]
) -> None:
    """Before any printer: the kernels' own float64 meaning is the function's."""
    function, dtype = CASES[name]
    x = torch.randn(4, 6).to(dtype)
    outputs = compiled[0][name].run((x,), by_interpreter)
    for ours, true in zip(outputs, function(x.double()), strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-11)
        else:
            assert torch.equal(ours, true)


def test_what_two_column_loops_compute_and_what_a_pad_gathers() -> None:
    """A running sum that both loops of a norm run, along the columns and along the rows; a gathered
    row whose positions are known before the loop in which the pad decides."""

    def running(x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(-1).log_softmax(-1)

    def running_down(x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(0).log_softmax(0)

    def gathered(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x.tanh().index_select(0, at), (1, 1))

    x, at = torch.randn(40, 33), torch.tensor([3, 0, 39])
    cases = [(running, (x,)), (running_down, (x,)), (gathered, (x, at))]
    made = [compile_function(function, *args) for function, args in cases]
    runner = CppRunner(made)
    for compilation, (function, args) in zip(made, cases, strict=True):
        (ours,) = compilation.run(args, runner)
        wide = [a.double() if a.is_floating_point() else a for a in args]
        assert excess(ours, function(*args), function(*wide)) is None
    with pytest.raises(CheckFailed):
        made[2].run((x, torch.tensor([3, 40, 0])), runner)
