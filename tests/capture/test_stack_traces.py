"""Stack traces of nodes are PyTorch's own texts and the user's functions, each written out once."""

from __future__ import annotations

import traceback
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from turbotx.capture import trace
from turbotx.capture.callables import FunctionModule
from turbotx.capture.trace import capture
from turbotx.ir.fx_nodes import place_of


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.part(x)
        return self.part(y) + y.relu() + y.relu()


def texts() -> list[str]:
    found = capture(Twice().eval(), (torch.randn(2, 4),), {})
    return [n.meta.get("stack_trace") for n in found.graph.nodes if n.op == "call_function"]


def test_texts_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts()
    monkeypatch.setattr(trace, "remembered_stack_traces", nullcontext)
    assert found == texts()
    assert len(set(found)) > 4 and all("in forward" in text for text in found)


class Helped(nn.Module):
    def scale(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(torch.nn.functional.gelu(x))


def test_a_place_is_in_the_function_or_method_that_computes() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def places(model: nn.Module, op: str) -> list[str]:
        graph = capture(model.eval(), (torch.randn(2, 4),), {}).graph
        return [place_of(node) for node in graph.nodes if op in node.name]

    line = Helped.scale.__code__.co_firstlineno + 1
    assert places(Helped(), "mul") == [f"{__file__}:{line}"]
    assert places(Helped(), "gelu") == [f"{__file__}:{line + 3}"]
    line = double.__code__.co_firstlineno + 1
    assert places(FunctionModule(double), "mul") == [f"{__file__}:{line}"]


def test_a_place_is_written_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = traceback.FrameSummary.__init__

    def init(self: traceback.FrameSummary, *args: object, **kwargs: object) -> None:
        made.append(1)
        plain(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(traceback.FrameSummary, "__init__", init)
    texts()
    few, _ = len(made), made.clear()
    monkeypatch.setattr(trace, "remembered_stack_traces", nullcontext)
    texts()
    assert 0 < few < len(made)
