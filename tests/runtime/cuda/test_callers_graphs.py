"""CUDA graphs that a caller captures around a module: whose memory they read, and for how long.

In: small modules on a stand-in device whose current stream is being captured. Out: launches in
memory that the graph owns, weights that stay, and what has to be done before the capture.
"""

from __future__ import annotations

import weakref

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.runtime.cuda.test_cuda_graphs import Twice, check, make
from turbotx.engine.optimize import engine_of
from turbotx.errors import DeviceError


def test_inside_a_callers_own_capture_memory_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, device = make(monkeypatch)
    check(fast, model, 2, 3, 8)
    with engine_of(fast).variants()[0].program.pool.lease(1) as arena:
        pass
    device.users_capture = True
    mark = len(device.log)
    check(fast, model, 2, 3, 8)
    check(fast, model, 2, 3, 8)
    assert not device.graphs
    inside = range(arena.data_ptr, arena.data_ptr + arena.mapped_nbytes)
    for entry in device.log[mark:]:
        assert entry[0] != "launch" or not any(value in inside for value in entry[4])
    with torch.no_grad():
        model.up.weight.mul_(2)
    with pytest.raises(DeviceError, match="call it once before the capture"):
        fast(torch.randn(2, 3, 8))


def test_a_callers_graph_cannot_load_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, device = make(monkeypatch)
    check(fast, model, 2, 3, 8)
    engine_of(fast).variants()[0].program.runtime.functions.clear()
    device.users_capture = True
    with pytest.raises(DeviceError, match="wants kernels that are not loaded"):
        fast(torch.randn(2, 5, 8))
    device.users_capture = False
    check(fast, model, 2, 5, 8)
    device.users_capture = True
    check(fast, model, 2, 5, 8)


@torch.no_grad()
def test_a_callers_graph_keeps_the_weights_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, device = make(monkeypatch, Twice())
    check(fast, model, 2, 3, 8)
    runtime = engine_of(fast).variants()[0].program.runtime
    device.users_capture = True
    for _ in range(2):
        check(fast, model, 2, 3, 8)
    read = [weakref.ref(t) for t in runtime.placed.held.tensors.values()]
    device.users_capture = False
    for changes in (1, 2):
        model.a.weight.mul_(2)
        check(fast, model, 2, 3, 8)
        assert all(tensor() is not None for tensor in read)
        assert runtime.weights.version == 1 + changes
    # What no graph of the caller's has read is let go of.
    assert list(engine_of(fast).variants()[0].program.callers_reads) == [1]
