"""`turbotx bench`: engines that agree on inputs, take turns, and say why they are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor
from torch.utils._pytree import tree_leaves

from turbotx.cli import main
from turbotx.cli.bench.engines import ENGINES, make_engine
from turbotx.cli.bench.gemms_only import make_gemms_only
from turbotx.cli.bench.peers import check_answer
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


@pytest.mark.parametrize("library", ["onednn", "int8"])
def test_the_floor_runs_the_products_of_any_shape(library: str) -> None:
    layer = torch.nn.Linear(8, 16).eval()
    run = make_gemms_only(ModelWithInputs(layer, (torch.randn(2, 3, 8),), {}), library)
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


ENCODER = """
import torch, transformers

def make():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    given = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": mask}
    return transformers.BertModel(config).eval(), given
"""


RIVALS = {
    "openvino": "openvino", "openvino-int8": "openvino", "ctranslate2": "ctranslate2",
    "ctranslate2-int8": "ctranslate2", "onnxruntime": "onnxruntime",
    "onnxruntime-optimized": "onnxruntime", "compile": "torch", "compile-dynamic": "torch",
}  # fmt: skip
"""Engines, with the package that each needs."""


@pytest.mark.parametrize("engine", RIVALS)
def test_a_peer_gives_the_models_answers(engine: str, tmp_path: Path) -> None:
    pytest.importorskip(RIVALS[engine])
    path = tmp_path / "encoder.py"
    path.write_text(ENCODER)
    loaded = Source(f"{path}:make").load({})
    with torch.no_grad(), inductor.patch(freezing=False):  # which an engine sets for its process
        run = make_engine(engine, loaded, tmp_path)  # compares with the model
        ids = torch.tensor([[7, 3, 1]])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = torch.as_tensor(next(iter(tree_leaves(run((), given)))))
        wanted = loaded.model(**given)[0]
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.99


def test_a_peer_that_answers_otherwise_is_not_measured() -> None:
    layer = torch.nn.Linear(8, 8).eval()
    loaded = ModelWithInputs(layer, (torch.randn(2, 8),), {})
    check_answer("other", lambda args, kwargs: [layer(*args)], loaded)
    with pytest.raises(ModelError, match="other gives other results"):
        check_answer("other", lambda args, kwargs: layer(*args) + 0.1, loaded)
    with pytest.raises(ModelError, match="other gives other results"):
        check_answer("other", lambda args, kwargs: layer(*args) * float("nan"), loaded)
    with pytest.raises(ModelError, match=r"\(1, 8\), the model \(2, 8\)"):
        check_answer("other", lambda args, kwargs: layer(*args)[:1], loaded)


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


def test_those_that_are_not_to_be_asked_for_are_compared(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = tuple(name for name in ENGINES if name != "eager")
    monkeypatch.setattr("turbotx.cli.bench.command.ASKED_FOR", others)
    with pytest.raises(SystemExit):
        main(["bench", model, "--rounds", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found["rows"][0]["engines"]) == {"eager"}


def test_an_unknown_engine_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", model, "--engine", "magic"])
    assert ended.value.code == 2 and "onnxruntime" in capsys.readouterr().err
