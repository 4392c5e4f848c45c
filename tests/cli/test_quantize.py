"""--quantize: what verify says of int8 products, and that a saved file has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command_line import Ran

SOURCE = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16),
                          nn.LayerNorm(16))
    return model.eval(), {"input": torch.randn(2, 3, 16)}
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "layers.py"
    path.write_text(SOURCE)
    return f"{path}:make"


def test_verify_of_int8_measures_launches_and_tells_what_quantising_costs(
    run: Callable[..., Ran], model: str, tmp_path: Path
) -> None:
    ran = run("verify", model, "--quantize", "int8", "--shape", "batch=3,seq=4", "--json")
    found = ran.json
    assert ran.code == 0 and found["holds"]
    (shape,) = found["shapes"]
    assert any("int8" in launch["name"] for launch in shape["launches"])
    assert not shape["outputs"]
    (likeness,) = shape["likenesses"]
    assert 0.99 < likeness["worst"] <= likeness["mean"] < 1 and likeness["rows"] == 12
    file = tmp_path / "int8.ttx"
    assert run("save", model, "--quantize", "int8", "--out", file).code == 0
    ran = run("verify", file, "--reference", model, "--json")
    (shape,) = ran.json["shapes"]
    assert ran.code == 0 and len(shape["likenesses"]) == 1
    ran = run("verify", model, "--quantize", "int7")
    assert ran.code != 0 and "quantize='int7' is not one of" in ran.err
