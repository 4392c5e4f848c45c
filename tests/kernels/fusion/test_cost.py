"""Store or compute again: the cheaper in bytes, said with both figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch

import turbotx
from tests.compiled_functions import Compilation, by_interpreter, compile_function
from turbotx.ir.expr import dim
from turbotx.kernels.fusion.cost import Choice

x, y, z = (torch.randn(3, 4, 8) for _ in range(3))


def sums(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two reductions that cannot be one kernel."""
    return value.sum(-1), value.sum(0)


CASES: dict[str, tuple[Callable[..., Any], int, str]] = {
    "three inputs make one value": (
        lambda x, y, z: sums((x * y + z).tanh()), 3,
        "tanh is stored, not computed again: ",
    ),
    "one input makes it": (lambda x: sums(x.tanh()), 1, "tanh is computed again, not stored: "),
    "two inputs: equal bytes": (
        lambda x, y: sums((x * y).tanh()), 2, "tanh is computed again, not stored: ",
    ),
}  # fmt: skip


def stored(made: Compilation) -> int:
    """Count the values that go from kernel to kernel."""
    outputs = sum(p.role == "out" for k in made.kernels for p in k.params)
    return outputs - 2


@pytest.mark.parametrize("name", CASES)
def test_the_cheaper_way(name: str) -> None:
    function, count, words = CASES[name]
    inputs = (x, y, z)[:count]
    made = compile_function(function, *inputs)
    (fused,) = made.fused
    assert len(fused.kernels) == 2 and len(fused.choices) == 1
    assert fused.choices[0].startswith(words)
    assert stored(made) == ("is stored" in words)
    wide = function(*(t.double() for t in inputs))
    for ours, true in zip(made.run(inputs, by_interpreter), wide, strict=True):
        torch.testing.assert_close(ours, true)


def test_the_figures_are_those_of_the_kernels() -> None:
    made = compile_function(CASES["three inputs make one value"][0], x, y, z)
    n = "batch*seq*x_d2"
    (choice,) = made.fused[0].choices
    results = "4*batch*seq + 4*seq*x_d2"
    assert choice.endswith(f"20*{n} + {results} rather than 24*{n} + {results} bytes")


def test_one_kernel_has_nothing_to_choose() -> None:
    (fused,) = compile_function(lambda x: (x.tanh().sum(-1), x.tanh() * 2), x).fused
    assert len(fused.kernels) == 1 and fused.choices == []


def test_a_middling_shape_decides_where_the_shape_would() -> None:
    batch = dim("batch")
    assert Choice("a", 4 * batch, 64 * sympy.Integer(5)).is_stored
    assert not Choice("a", 4 * batch**2, 64 * batch).is_stored
    assert not Choice("a", 4 * batch, 4 * batch).is_stored


def test_the_report_says_it() -> None:
    class Model(torch.nn.Module):
        def forward(self, x, y, z):
            return sums((x * y + z).tanh())

    report = turbotx.explain(turbotx.optimize(Model().eval(), backend="aten"), x, y, z)
    (region,) = report.regions
    assert "tanh is stored, not computed again" in region.reason
