"""The examples run as a newcomer runs them, and fail where they should.

In: examples/*.py. Out: their exit codes; the demo's own checks, on inputs that must break them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Double(nn.Module):
    """Looks like an encoder to the demo: an embedding's rows, doubled, off by `error`."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.table, self.error = nn.Embedding(10, 4), error

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        class Output:
            last_hidden_state = self.table(input_ids) * 2 + self.error

        return Output


def compare(demo: ModuleType, error: float) -> bool:
    model, wrong = Double(0.0).eval(), Double(error).eval()
    wrong.table = model.table
    ids = torch.arange(6).reshape(2, 3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return bool(demo.compare(model, wrong, [batch])["agrees"])


def test_the_demo_accepts_equal_outputs(demo: ModuleType) -> None:
    assert compare(demo, 0.0)


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_the_demo_notices_wrong_outputs(demo: ModuleType, error: float) -> None:
    assert not compare(demo, error)


def test_a_pooled_sentence_does_not_see_its_padding(demo: ModuleType) -> None:
    hidden = torch.randn(1, 4, 8)
    short = demo.pool_mean(hidden[:, :2], torch.ones(1, 2))
    padded = demo.pool_mean(hidden, torch.tensor([[1, 1, 0, 0]]))
    torch.testing.assert_close(short, padded)


@pytest.mark.slow
def test_the_demo_runs(minilm_path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "holds" in done.stdout and "captures: 1" in done.stdout
    assert (tmp_path / "out" / "report.html").is_file()
