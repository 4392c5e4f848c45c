"""Variants of kernels: few rows have a program each, many share some, and none is built late."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.runtime.cuda.stand_in_device import RecordingDevice, bind_to
from turbotx.kernels.heuristics import heuristics_for
from turbotx.kernels.schedule import MANY_ROWS


def grids(device: RecordingDevice) -> list[int]:
    """Return on how many programs each kernel was launched."""
    return [entry[2][0] for entry in device.log if entry[0] == "launch"]


def test_many_rows_share_programs_that_are_built_beforehand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = RecordingDevice()
    fast = bind_to(device, lambda x: F.layer_norm(x, (256,)), monkeypatch, cuda_graphs=False)
    most = heuristics_for(device.target).programs
    fast(torch.zeros(40, 256, dtype=torch.float16))
    built = len(device.loaded)
    few = grids(device)
    device.log.clear()
    fast(torch.zeros(4 * MANY_ROWS, 256, dtype=torch.float16))
    assert len(device.loaded) == built, "no shape builds a kernel later"
    (many,) = grids(device)
    assert few[-1] <= 40 and 0 < many <= most
