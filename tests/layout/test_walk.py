"""The way of a call: few rooms, and the hot path fewer."""

from __future__ import annotations

import torch

import turbotx
from tests.layout.walk import block, files_entered, rooms_entered


def test_a_call_goes_through_few_rooms() -> None:
    fast = turbotx.optimize(block)
    x, weight = torch.randn(2, 5, 16), torch.randn(16, 16)
    first = rooms_entered(files_entered(lambda: fast(x, weight)))
    assert {"engine", "capture", "passes", "kernels", "memory", "program", "runtime"} <= set(first)
    assert not {"report", "saved", "serving", "cli"} & set(first)
    rooms = [room for room in first if "." not in room]
    assert len(rooms) <= 10, rooms
    second = rooms_entered(files_entered(lambda: fast(x, weight)))
    assert set(second) <= {"engine", "capture", "runtime", "memory"}, second
