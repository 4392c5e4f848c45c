"""What a model's code can write to is found, however long the way through the code is."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from torch import nn

from turbotx.capture.sandbox.reach import Reach


def model_calling(function: Any) -> nn.Module:
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    return Model()


def texts(model: nn.Module) -> set[str]:
    return {w.text.partition(" of ")[0] for w in Reach(model, (), {}).watched}


def test_a_chain_of_functions_longer_than_the_stack() -> None:
    count = sys.getrecursionlimit()
    source = "\n".join(f"def step{k}(x): return step{k + 1}(x)" for k in range(count))
    scope: dict[str, Any] = {"__name__": "chain", "KEPT": []}
    exec(f"{source}\ndef step{count}(x):\n    KEPT.append(x)\n    return x", scope)
    assert "KEPT" in texts(model_calling(scope["step0"]))


def test_modules_that_name_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = types.ModuleType("first"), types.ModuleType("second")
    first.second, second.first, second.KEPT = second, first, []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "first", first)
    exec("def run(x):\n    first.second.first.second.KEPT.append(x)\n    return x", vars(first))
    first.first = first  # type: ignore[attr-defined]
    assert "KEPT" in texts(model_calling(first.run))  # type: ignore[attr-defined]
