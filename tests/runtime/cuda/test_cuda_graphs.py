"""CUDA graphs of a program, on stand-ins for a device: what is captured, copied, kept and dropped.

In: small modules bound to a device that interprets kernels, or only writes requests down. Out:
results equal to eager's whatever order shapes come in, and logs of launches and replays.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.runtime.cuda.stand_in_device import InterpretedDevice, RecordingDevice, bind_to
from turbotx.engine.optimize import engine_of
from turbotx.errors import BuildWarning, DeviceError, IndexOutOfRangeError, InputError, OptionsError
from turbotx.runtime.placement import find_device, open_device


class Block(nn.Module):
    """One GEMM, one generated kernel, one GEMM."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)) * 0.5)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids) * 2.0


def make(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module | None = None, **options: Any
) -> tuple[Any, nn.Module, InterpretedDevice]:
    device, model = InterpretedDevice(), (model or Block()).eval()
    return bind_to(device, model, monkeypatch, **options), model, device


@torch.no_grad()
def check(fast: Any, model: nn.Module, *shape: int) -> torch.Tensor:
    x = torch.randn(*shape)
    got = fast(x)
    torch.testing.assert_close(got, model(x))
    return got


def test_shapes_that_alternate_are_never_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, device = make(monkeypatch, max_graphs=2)
    for rows in (2, 3, 2, 3, 2, 3, 2, 3, 30, 30, 2, 3, 0, 0, 1, 1, 30, 2):
        check(fast, model, 2, rows, 8)
    assert fast.stats()["captures"] == 2  # no rows have a capture of their own
    assert len(engine_of(fast).variants()[0].program.graphs.kept) == 2
    # The kept graphs of 2 and 3 were replayed; others had to go and were captured again.
    assert max(graph.replays for graph in device.graphs) >= 3


def test_the_first_use_is_plain_and_a_replay_launches_nothing_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, model, device = make(monkeypatch)
    check(fast, model, 2, 3, 8)
    assert not device.names("capture")
    launches = len(device.names("launch"))
    check(fast, model, 2, 3, 8)
    assert len(device.graphs) == 1
    assert len(device.names("launch")) == 2 * launches
    check(fast, model, 2, 3, 8)
    assert len(device.names("launch")) == 2 * launches
    assert device.graphs[0].replays == 2


class CoarseClock(RecordingDevice):
    """Launches of 3 us, a second apart; a difference is a float32 of milliseconds, as CUDA's is."""

    def clock(self) -> int:
        super().clock()
        count = sum(entry[0] == "clock" for entry in self.log) - 1
        return count // 2 * 1_000_000_000 + count % 2 * 3000

    def elapsed(self, begin: int, end: int) -> int:
        return round(float(np.float32((end - begin) / 1e6)) * 1e6)


@torch.no_grad()
def test_times_of_launches_are_measured_from_one_mark_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = nn.Sequential(*(Block() for _ in range(8))).eval(), torch.randn(2, 3, 8)
    fast = bind_to(CoarseClock(), model, monkeypatch)
    fast(x)
    program = engine_of(fast).variants()[0].program
    count = len(program.executable.launches)
    assert count >= 16
    ticks = (ctypes.c_int64 * (2 * count))()
    program.run(program.bind((2, 3)), [x], ticks)
    times = np.array(ticks).reshape(count, 2)
    assert times[0, 0] == 0
    assert (times[:, 1] - times[:, 0] == 3000).all()


def test_kernels_are_loaded_before_a_capture_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, device = make(monkeypatch, max_shapes=1)
    check(fast, model, 2, 3, 8)
    check(fast, model, 2, 5, 8)
    runtime = engine_of(fast).variants()[0].program.runtime
    # The first shape's binding has made room for the second's, and so have its kernels.
    runtime.functions.clear()
    device.loaded.clear()
    check(fast, model, 2, 3, 8)
    assert len(device.graphs) == 1
    assert device.loaded


def test_outputs_are_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, _ = make(monkeypatch)
    results = [check(fast, model, 2, 3, 8) for _ in range(4)]
    copies = [x.clone() for x in results]
    check(fast, model, 2, 3, 8)
    assert all(torch.equal(a, b) for a, b in zip(results, copies, strict=True))
    assert len({x.data_ptr() for x in results}) == 4


def test_a_graph_reads_no_inputs_or_outputs_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _, device = make(monkeypatch)
    given = [torch.randn(2, 3, 8) for _ in range(2)]
    outputs = [fast(x) for x in given]
    launches = [entry for entry in device.log if entry[0] == "launch"]
    (graphed,) = launches[len(launches) // 2 :]
    theirs = {x.data_ptr() for x in (*given, *outputs)}
    assert not theirs & set(graphed[4])


def test_changed_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, device = make(monkeypatch)
    for _ in range(3):
        check(fast, model, 2, 3, 8)
    with torch.no_grad():
        model.up.weight.mul_(3)
    check(fast, model, 2, 3, 8)
    model.down.weight = nn.Parameter(torch.randn(8, 16))
    check(fast, model, 2, 3, 8)
    check(fast, model, 2, 3, 8)
    assert len(device.graphs) == 3


def test_graphs_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, device = make(monkeypatch, cuda_graphs=False)
    for _ in range(3):
        check(fast, model, 2, 3, 8)
    assert not device.graphs


def test_slices_and_transposed_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, _ = make(monkeypatch)
    for _ in range(3):
        x = torch.randn(49)[1:].view(2, 3, 8)  # begins between two multiples of 16 bytes
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
            x = torch.randn(8, 3, 2).permute(2, 1, 0)
            torch.testing.assert_close(fast(x), model(x))


def test_an_index_out_of_range_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, _ = make(monkeypatch, Lookup())
    good, bad = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 12, 3]])
    for _ in range(3):  # plainly, captured, replayed
        with pytest.raises(IndexOutOfRangeError, match="ids"):
            fast(bad)
        torch.testing.assert_close(fast(good), model(good))


class TwoLookups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(10, 8), nn.Embedding(3, 8)

    def forward(self, ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        return self.words(ids) * 2.0 + self.kinds(kinds)


def test_each_check_of_a_kernel_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, device = make(monkeypatch, TwoLookups())
    good = (torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]]))
    for _ in range(3):  # plainly, captured, replayed
        seen = []
        for call in ((good[0] * 5, good[1] * 5), good):
            with pytest.raises(IndexOutOfRangeError) as raised:
                fast(*call)
            seen.append(str(raised.value))
        assert len(set(seen)) == 2
        torch.testing.assert_close(fast(*good), model(*good))
    assert len(set(device.names("launch"))) == 1


def test_launches_go_to_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    device = RecordingDevice()
    fast = bind_to(device, Block().eval(), monkeypatch, cuda_graphs=False)
    fast(torch.randn(2, 3, 8))
    device.current_stream = "another"
    fast(torch.randn(2, 3, 8))
    streams = [entry[3] for entry in device.log if entry[0] == "launch"]
    assert streams == ["default"] * (len(streams) // 2) + ["another"] * (len(streams) // 2)


class Twice(nn.Module):
    """Two GEMMs on one input, whose weights are put together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).tanh() + self.b(x).tanh()


def test_other_streams_read_derived_weights_when_they_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, model, device = make(monkeypatch, Twice())
    for change in (False, True):
        if change:
            with torch.no_grad():
                model.a.weight.mul_(2)
        device.log.clear()
        for _ in range(3):
            check(fast, model, 2, 3, 8)
        kinds = [entry[0] for entry in device.log]
        assert kinds.count("wait") == 1
        assert kinds.index("wait") < kinds.index("launch")


def test_weights_are_retained_once_by_each_stream_that_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, model, device = make(monkeypatch, Twice())
    for stream in ("default", "another", "default", "another", "third"):
        device.current_stream = stream
        check(fast, model, 2, 3, 8)  # plain, then captured, then replayed
    assert device.names("retain") == ["default", "another", "third"]
    weights = engine_of(fast).variants()[0].program.runtime.weights
    derived = {weights.tensors[name].data_ptr() for name in weights.hoisted}
    assert derived
    assert all(derived <= set(e[2]) for e in device.log if e[0] == "retain")
    with torch.no_grad():
        model.a.weight.mul_(2)
    device.log.clear()
    check(fast, model, 2, 3, 8)
    assert device.names("retain") == ["third"]  # the new ones


def test_two_threads_have_an_arena_and_graphs_each(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, _ = make(monkeypatch)
    check(fast, model, 2, 3, 8)
    failures: list[BaseException] = []

    def work(seq: int) -> None:
        try:
            for _ in range(6):
                check(fast, model, 2, seq, 8)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(3 + k % 2,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_cannot_be_captured_runs_plainly_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, model, device = make(monkeypatch)
    device.refuses = RuntimeError("operation not permitted when stream is capturing\nmore")
    check(fast, model, 2, 3, 8)
    with pytest.warns(BuildWarning, match="operation not permitted"):
        check(fast, model, 2, 3, 8)
    check(fast, model, 2, 3, 8)


def test_memory_given_back_takes_its_graphs_along(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model, device = make(monkeypatch)
    for _ in range(3):
        check(fast, model, 2, 3, 8)
    engine_of(fast).variants()[0].program.pool.trim()
    check(fast, model, 2, 3, 8)
    assert len(device.graphs) == 2


def test_reserve_leaves_room_for_a_graphs_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = bind_to(RecordingDevice(), Block().eval(), monkeypatch)
    fast(torch.randn(2, 3, 8))
    names = engine_of(fast).variants()[0].program.dims
    fast.reserve(**dict.fromkeys(names, 200))
    allocations = fast.stats()["chunk_allocations"]
    for _ in range(3):
        fast(torch.randn(200, 200, 8))
    assert fast.stats()["chunk_allocations"] == allocations


def test_a_backend_must_fit_the_device() -> None:
    gpu = torch.device("cuda", 1)
    with pytest.raises(OptionsError, match=r'on cpu.*\.to\("cuda"\)'):
        open_device(torch.device("cpu"), "triton")
    with pytest.raises(OptionsError, match=r'cuda:1.*backend="triton"'):
        open_device(gpu, "cpp")
    assert open_device(torch.device("cpu"), "auto") is None
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="PyTorch sees no CUDA device"):
            open_device(gpu, "auto")


def test_a_call_is_on_one_device() -> None:
    x = torch.empty(2, 3, device="meta")
    with pytest.raises(InputError, match=r"input is on meta.*up\.weight is on cpu"):
        find_device(Block(), [x])
    assert find_device(Block().to("meta"), [x, 3]) == torch.device("meta")
    assert find_device(nn.Module(), []) == torch.device("cpu")


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_dependent_launches_follow_kernels_only(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = RecordingDevice()
    device.target = target
    wide = {"schedules": {"gemm_*16x8*": "cublas"}}  # the first GEMM is PyTorch's
    fast = bind_to(device, Block().eval(), monkeypatch, pdl=True, gemms="triton", **wide)
    for _ in range(2):  # plainly, then captured
        device.log.clear()
        fast(torch.randn(2, 3, 8))
        begin = [e[0] for e in device.log].index("capture") if device.graphs else 0
        queued = [e for e in device.log[begin:] if e[0] in ("launch", "call")][:3]
        # PyTorch's GEMM, the kernel behind it in the ordinary way, a template behind that kernel.
        assert [e[-1] for e in queued] == ["mm", False, target == "sm_90"]
    assert all(job.pdl == (target == "sm_90") for job in device.loaded.values())
