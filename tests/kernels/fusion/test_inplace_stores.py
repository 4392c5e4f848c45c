"""A kernel that may write over its input reads it once only, through the whole pipeline."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx import ir
from turbotx.engine.optimize import engine_of
from turbotx.errors import VerifyError


class SharedProducer(nn.Module):
    """The product is read for every batch by one output, and once by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = self.first(x).tanh()
        return self.second(wide * 2), wide + t


@needs_compiler
def test_an_output_smaller_than_the_loops() -> None:
    model = SharedProducer().eval()
    x, t = torch.randn(5, 8), torch.randn(3, 5, 8)
    with torch.no_grad():
        expected = model(x, t)
        for ours, eager in zip(turbotx.optimize(model)(x, t), expected, strict=True):
            torch.testing.assert_close(ours, eager)


LINEAR = nn.Linear(16, 16).requires_grad_(False)


def between_sweeps(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x @ LINEAR.weight
    return LINEAR(h - h.amax(-1, keepdim=True)), h.log_softmax(-1)


def take_every_pair(kernel: ir.Kernel) -> tuple[tuple[str, str], ...]:
    outs, ins = ([p for p in kernel.params if p.role == role] for role in ("out", "in"))
    return tuple((o.name, i.name) for o in outs for i in ins if i.shape == o.shape)


@needs_compiler
def test_printed_source_is_checked_against_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbotx.runtime.cpu.launch_table.find_inplace", take_every_pair)
    with pytest.raises(VerifyError, match=r"in place, and reads \w+ at .* after it"):
        turbotx.optimize(between_sweeps)(torch.randn(3, 16))


@needs_compiler
def test_poison_tells_a_launch_that_spoils_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both that decides and that checks fail: the run itself finds the difference."""
    monkeypatch.setattr("turbotx.program.assemble.find_inplace", take_every_pair)
    monkeypatch.setattr("turbotx.runtime.cpu.launch_table.check_inplace", lambda *a: None)
    monkeypatch.setenv("TURBOTX_POISON", "1")
    with pytest.raises(VerifyError, match="log_softmax is another one beside linear"):
        turbotx.optimize(between_sweeps)(torch.randn(3, 16))


@needs_compiler
def test_poison_says_nothing_of_reuse_that_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOTX_POISON", "1")

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = (LINEAR(x) @ LINEAR.weight).softmax(-1) + x
        return x

    fast, x = turbotx.optimize(chain), torch.randn(3, 16)
    torch.testing.assert_close(fast(x), chain(x))
    (compiled,) = engine_of(fast).variants()
    assert compiled.program.liveness.reused
