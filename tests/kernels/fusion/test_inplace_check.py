"""The check of in-place reuse rejects source that breaks each of its rules, in both languages."""

from __future__ import annotations

import pytest
import torch

from tests.compiled_functions import compile_function
from turbotx.errors import VerifyError
from turbotx.kernels.cpp.printer import print_kernel
from turbotx.kernels.fusion.inplace import find_inplace
from turbotx.kernels.fusion.inplace_check import check_inplace
from turbotx.kernels.schedule import Schedule
from turbotx.kernels.triton.printer import print_triton

CPP = """
for (int64_t row = 0; row < n; ++row) {
  // reads ttx::read(x + row * 8 + col) in a comment
  for (int64_t col = 0; col < 8; ++col) {
    const float v = ttx::read(x + row * 8 + col);
    const float w = ttx::read(other + f(row, col));
    ttx::write(y + row * 8 + col, ttx::relu(v, w));
  }
}
"""
TRITON = """
    # tl.load(x_ptr + 3) in a comment
    x = tl.load(
        x_ptr + row * 8 + col,
        mask=row_ok & col_ok,
    ).to(tl.float32)
    tl.store(y_ptr + row * 8 + col, tl.where(x > 0, x, 0), mask=row_ok & col_ok)
"""
AXES = ["row", "col"]


def check(source: str, pair: tuple[str, str] = ("y", "x")) -> None:
    check_inplace("kernel", source, AXES, [pair])


def test_a_place_that_is_read_before_it_is_written_passes() -> None:
    check(CPP)
    check(TRITON, ("y_ptr", "x_ptr"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  }\n}\n", "  }\n  again += ttx::read(x + row * 8 + col);\n}\n", "after it"),
        ("read(x + row * 8 + col);\n    const float w", "read(x + col);\n    const", "touches x"),
        ("v = ttx", "v = inside ? ttx", "under a mask"),
        ("    ttx::write", "    if (inside) ttx::write", "under a mask"),
        ("write(y + row * 8 + col", "write(y + row * 8", "once for every col"),
        ("ttx::write(y", "ttx::write(z", "0 accesses to y"),
        ("ttx::relu(v, w));", "v); ttx::write(y + row * 8 + col, w);", "2 accesses to y"),
    ],
)
def test_cpp_that_breaks_a_rule_is_rejected(old: str, new: str, words: str) -> None:
    assert old in CPP
    with pytest.raises(VerifyError, match=words):
        check(CPP.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("col_ok)\n", "col_ok)\n    z = tl.load(x_ptr + row * 8 + col)\n", "after it"),
        ("x_ptr + row * 8 + col,", "x_ptr + col * 8 + row,", "touches x_ptr"),
        ("mask=row_ok & col_ok,", "mask=col_ok & inside,", "under a mask"),
        ("tl.store(y_ptr + row * 8 + col", "tl.store(y_ptr + row * 8", "once for every col"),
    ],
)
def test_triton_that_breaks_a_rule_is_rejected(old: str, new: str, words: str) -> None:
    assert old in TRITON
    with pytest.raises(VerifyError, match=words):
        check(TRITON.replace(old, new), ("y_ptr", "x_ptr"))


def load_after_store(x, y):
    wide = torch.cat([x[..., :4], y[..., 4:]], -1)
    return wide.tanh(), wide.sigmoid() + x.exp()


def store_between_sweeps(x):
    return x - x.amax(-1, keepdim=True), x.log_softmax(-1)


@pytest.mark.parametrize(
    ("function", "count", "wrong"),
    [(load_after_store, 2, ("tanh", "x")), (store_between_sweeps, 1, ("sub", "x"))],
)
def test_it_catches_what_a_careless_decision_would_take(function, count, wrong) -> None:
    """Each kernel as it is printed, with the pair that was once taken for safe."""
    made = compile_function(function, *(torch.randn(3, 4, 8) for _ in range(count)))
    (kernel,) = made.kernels
    axes = [a.name for a in kernel.axes]
    assert wrong not in find_inplace(kernel)
    with pytest.raises(VerifyError):
        check_inplace(kernel.name, print_kernel(kernel), axes, [wrong])


def test_a_looped_row_of_triton_that_is_read_again_is_rejected() -> None:
    def centred_and_scaled(x):
        away = x - x.mean(-1, keepdim=True)
        return away, x * away.exp().sum(-1, keepdim=True)

    (kernel,) = compile_function(centred_and_scaled, torch.ones(3, 8)).kernels
    looped = print_triton(kernel, Schedule(1, 4, looped=True))
    axes = [a.name for a in kernel.axes]
    assert find_inplace(kernel) == (("mul", "x"),)
    check_inplace(kernel.name, looped, axes, [("mul_ptr", "x_ptr")])
    with pytest.raises(VerifyError, match="after it"):
        check_inplace(kernel.name, looped, axes, [("sub_ptr", "x_ptr")])
