"""Stack traces of nodes are PyTorch's own texts, each written out once."""

from __future__ import annotations

import traceback
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from turbotx.capture import trace
from turbotx.capture.trace import capture


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
