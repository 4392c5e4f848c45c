"""Batches without padding as the server runs them on a GPU: by its engine, over the model's files.

In: a small BERT on disk, batches of mixed lengths, several in a row. Out: the vectors of the same
engine on a CPU; costs that are measured over graphs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")
pytest.importorskip("transformers")

from tests.runtime.cuda.stand_in_device import InterpretedDevice, RecordingDevice
from tests.serving.tiny_models import bert, save
from turbotx.serving.measure import measure_token_costs
from turbotx.serving.model_files import load_model
from turbotx.serving.tokens import TokenRow

BATCHES = ([4, 3], [9], [1, 7, 2], [4, 3])


def rows_of(lengths: list[int]) -> list[TokenRow]:
    return [TokenRow((2, *(5 + k % 4 for k in range(n - 2)), 3)[:n]) for n in lengths]


def test_batches_on_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", bert())
    wanted = [load_model(str(folder)).engine.run(rows_of(lengths)) for lengths in BATCHES]
    device = InterpretedDevice()
    monkeypatch.setattr("turbotx.engine.engine.open_device", lambda place, backend: device)
    engine = load_model(str(folder)).engine
    for lengths, expected in zip(BATCHES, wanted, strict=True):
        np.testing.assert_allclose(engine.run(rows_of(lengths)), expected, rtol=3e-5, atol=3e-5)
    assert engine.packs and any("packed_attention" in n for n in device.names("launch"))
    assert engine.figures()["graph_captures"] == 1  # of 16 tokens


def test_costs_are_measured_over_few_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, device = save(tmp_path / "model", bert()), RecordingDevice()
    monkeypatch.setattr("turbotx.engine.engine.open_device", lambda place, backend: device)
    engine = load_model(str(folder)).engine
    costs = measure_token_costs(engine, max_length=32, max_batch=4)
    assert costs.batch_ms([3, 30]) > 0
    assert 0 < engine.figures()["graph_captures"] <= 4  # of 16, 32, 64 and 128 tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_this_gpu(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", bert())
    alone, engine = (load_model(str(folder), device=d).engine for d in ("cpu", "cuda"))
    for lengths in (*BATCHES, [20] * 30, [1] * 50, *BATCHES):
        ours, expected = (e.run(rows_of(lengths)) for e in (engine, alone))
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-3)
    assert engine.packs and engine.figures()["graph_captures"] > 0
    assert measure_token_costs(engine, max_length=32, max_batch=32).batch_ms([3, 30]) > 0
