"""Programs for GPUs that are not here, saved on a CPU and run from the file alone.

In: tiny BERT, GPT-2 and Llama. Out: errors against float64, plain, captured and replayed; refusals
that say what the file has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")
pytest.importorskip("safetensors")

import turbotx
from tests.models import token_inputs
from tests.runtime.test_triton_programs import check, tiny
from tests.saved.stand_in_cubins import Cubins

pytest.importorskip("transformers")


def saved(model: Any, path: Path, targets: list[str], **options: Any) -> Any:
    fast = turbotx.optimize(model, **options)
    fast(**token_inputs(2, 3))
    turbotx.save(fast, path, targets=targets)
    return fast


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_model_saved_on_a_cpu_runs_on_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbotx.kernels.gemm_choice.MOST_FOLDED", 16)
    model = tiny(name, torch.float32 if name == "llama" else torch.float16)
    cubins = Cubins(monkeypatch)
    saved(model, tmp_path / "m.ttx", ["sm_90"])
    loaded = cubins.load(tmp_path / "m.ttx")
    assert cubins.device is not None
    placed = len(cubins.device.placed)
    for batch, seq in ((2, 3), (1, 1), (2, 3), (3, 7), (2, 3), (3, 7), (3, 7), (1, 16)):
        check(loaded, model, batch, seq)
    stats = loaded.stats()
    assert stats["kernel_builds"] == 0 and stats["graph_captures"] == 2
    assert sorted(graph.replays for graph in cubins.device.graphs) == [2, 2]
    assert len(cubins.device.placed) == placed
