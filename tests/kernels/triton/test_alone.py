"""Dumped Triton files stand alone: with torch and triton importable only, they import and run.

In: the files of a dump, another process, Triton's interpreter. Out: PyTorch's own values.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import turbotx

pytest.importorskip("triton")

SCRIPT = """
import importlib.util, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("turbotx", "transformers", "rich", "typer"):
            raise ImportError(name + " must not be needed")

sys.meta_path.insert(0, Refuse())
import torch

source, name, given, made = sys.argv[1:]
spec = importlib.util.spec_from_file_location("dumped", source)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
x, weight, bias = torch.load(given)
out = torch.empty_like(x)
getattr(module, name)[(len(x),)](x, weight, bias, out, len(x), ROWS=1, COLS=32)
torch.save(out, made)
"""


def test_a_dumped_kernel_runs_with_triton_and_torch_alone(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.LayerNorm(24), nn.GELU()).eval(), torch.randn(5, 24)
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.normal_()
        expected = model(x)
    report = turbotx.explain(model, x)
    report.dump(tmp_path)
    (kernel,) = report.kernels
    torch.save((x, model[0].weight.detach(), model[0].bias.detach()), tmp_path / "given.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    source = tmp_path / "kernels" / f"{kernel.name}.triton.py"
    arguments = [source, kernel.name, tmp_path / "given.pt", tmp_path / "made.pt"]
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "made.pt"), expected)
