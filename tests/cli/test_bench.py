"""`turbotx bench`: engines that agree on inputs, take turns, and say why they are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from turbotx.cli import main
from turbotx.cli.bench.gemms_only import make_gemms_only
from turbotx.cli.bench.runner import CallPattern, EngineFailed, Runner, Turn, Worker, summarize
from turbotx.cli.models import ModelWithInputs, Source
from turbotx.errors import ModelError

SOURCE = """
import torch

def make():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval()
    return model, (torch.randn(2, 3, 8),)
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "small.py"
    path.write_text(SOURCE)
    return f"{path}:make"


def test_median_and_tenths() -> None:
    turns = [Turn([float(x) for x in range(100, 50, -1)], 4000.0), Turn(range(1, 51), 1000.0)]
    spread = summarize(turns)
    assert (spread.median_ms, spread.low_ms, spread.high_ms, spread.runs) == (50.5, 11, 90, 100)
    assert (spread.p95_ms, spread.p99_ms, spread.calls_per_s) == (96, 100, 20.0)


def test_the_floor_runs_the_products_of_any_shape() -> None:
    layer = torch.nn.Linear(8, 16).eval()
    run = make_gemms_only(ModelWithInputs(layer, (torch.randn(2, 3, 8),), {}), "onednn")
    run((torch.randn(2, 3, 8),), {})
    run((torch.randn(1, 1, 8),), {})
    half = ModelWithInputs(layer.bfloat16(), (torch.randn(2, 3, 8).bfloat16(),), {})
    with pytest.raises(ModelError, match="float32"):
        make_gemms_only(half, "mkl")


def test_a_worker_says_why_it_fails() -> None:
    worker = Worker("eager", Source("no_such_module:make"), threads=1)
    with pytest.raises(EngineFailed, match="no_such_module"):
        worker.wait_ready()
    worker.stop()


def test_engines_take_turns(model: str, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.pt"
    torch.save(((torch.randn(2, 3, 8),), {}), inputs)
    with Runner(("eager", "onnxruntime"), Source(model), threads=1) as runner:
        found = runner.measure(inputs, CallPattern(rounds=2, calls=3, streams=2))
        assert found["eager"].runs == 12 and found["eager"].calls_per_s > 0
        assert found["eager"].runs == 12 and found["eager"].median_ms > 0
        assert "onnxruntime" in runner.failed  # positional inputs, or not installed


def test_command(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", model, "--engine", "eager", "--shape", "batch=3", "--rounds", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and found["rows"][0]["dims"]["batch"] == 3
    assert set(found["rows"][0]["engines"]) == {"eager"} and not found["failed"]


def test_an_unknown_engine_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", model, "--engine", "magic"])
    assert ended.value.code == 2 and "onnxruntime" in capsys.readouterr().err
