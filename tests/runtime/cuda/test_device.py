"""The real device class over stand-ins for PyTorch's CUDA and for the driver.

In: jobs, launches, a body to capture. Out: the order of calls: contexts, streams, workspaces and
pools; and the words of errors for devices that cannot be used.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.compiled_functions import compile_function
from tests.runtime.cuda.test_driver import StandInDriver
from turbotx.errors import DeviceError
from turbotx.kernels.job import Binary
from turbotx.kernels.triton.compiler import kernel_job
from turbotx.memory.capture_lock import capture_lock
from turbotx.runtime.cuda.device import CudaDevice, CudaRecorder, require_cuda

GPU = torch.device("cuda", 1)


class StandInCuda:
    """What is used of torch.cuda, writing down what it is asked."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)
    ) -> None:
        self.log: list[Any] = []
        self.current = SimpleNamespace(cuda_stream=7, wait_stream=self.note("current waits for"))
        self.invalid, self.recording = False, set()
        facts = {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "get_device_capability": lambda index: capability,
            "get_device_name": lambda index: "Some GPU",
            "get_device_properties": lambda index: SimpleNamespace(
                shared_memory_per_block_optin=232448
            ),
            "init": lambda: None,
            "current_stream": lambda device: self.current,
            "current_device": lambda: 0,
            "device": self.entered("device"),
            "stream": self.entered("stream"),
            "Stream": lambda device: SimpleNamespace(wait_stream=self.note("side waits for")),
            "CUDAGraph": lambda: SimpleNamespace(
                capture_begin=self.begin, capture_end=self.end, replay=self.note("replay")
            ),
            "graph_pool_handle": lambda: (0, len(self.log)),
            "current_blas_handle": self.note("cuBLAS handle"),
        }
        for name, value in facts.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "hip", None)
        functions = {
            "clearCublasWorkspaces": self.note("clear workspaces"),
            "endAllocateToPool": self.end_allocation,
            "releasePool": lambda index, pool: self.log.append(("release", index, pool)),
        }
        for name, value in functions.items():
            monkeypatch.setattr(torch._C, f"_cuda_{name}", value, raising=False)

    def note(self, name: str) -> Any:
        return lambda *args, **options: self.log.append((name, options) if options else name)

    def begin(self, pool: Any = "its own", capture_error_mode: str = "") -> None:
        assert pool not in self.recording, "beginAllocateToPool: already recording to mempool_id"
        self.log.append(("begin", pool, capture_error_mode))
        self.recording.add(pool)
        self.latest = pool

    def end(self) -> None:
        """As PyTorch's: the allocator is told after the stream's capture has ended well."""
        self.log.append("end")
        if self.invalid and self.latest != "its own":
            raise RuntimeError("operation failed due to a previous error during capture")
        self.recording.discard(self.latest)

    def end_allocation(self, index: int, pool: Any) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)
        self.log.append(("end allocation", index, pool))

    def entered(self, name: str) -> Any:
        @contextmanager
        def enter(what: Any) -> Any:
            self.log.append(f"enter {name}")
            try:
                yield
            finally:
                self.log.append(f"leave {name}")

        return enter


def test_kernels_are_built_for_the_device_and_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = compile_function(lambda x: torch.exp(x) * 3, torch.randn(4, 8)).kernels[0]
    StandInCuda(monkeypatch)
    driver = StandInDriver()
    device = CudaDevice(GPU, driver)
    assert (device.target, device.torch_device, device.describe()) == ("sm_90", GPU, "Some GPU")
    job = kernel_job(kernel, device.target)
    (function,), _ = device.load([job])
    assert device.load([job]) == ([function], 0)
    assert len(driver.named("cuModuleLoadData")) == 1
    with device.active():
        device.launch(function, (3, 1, 1), None, device.stream())
    (launched,) = driver.named("cuLaunchKernel")
    assert launched[1:4] == (3, 1, 1)
    assert launched[8] == 7
    # The context is there before anything is loaded.
    names = [name for name, _ in driver.calls]
    assert names.index("cuCtxSetCurrent") < names.index("cuModuleLoadData")


def test_machine_code_is_loaded_as_it_is_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    StandInCuda(monkeypatch)
    driver = StandInDriver()
    device = CudaDevice(GPU, driver)
    binary = Binary("k", "sm_90", "k_0d1d", 128, 4, 0, b"\x7fELF...")
    (function,) = device.place([binary])
    assert device.place([replace(binary)]) == [function]
    (loaded,) = driver.named("cuModuleLoadData")
    assert loaded[1] == binary.image
    assert driver.named("cuModuleGetFunction")[0][2] == b"k_0d1d"
    names = [name for name, _ in driver.calls]
    assert names.index("cuCtxSetCurrent") < names.index("cuModuleLoadData")


def test_weights_are_waited_for_and_recorded_on_the_current_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = StandInCuda(monkeypatch)
    cuda.current.synchronize = cuda.note("synchronize")
    device = CudaDevice(GPU, StandInDriver())
    device.wait()
    tensor = SimpleNamespace(record_stream=lambda stream: cuda.log.append(stream))
    device.retain([tensor])
    assert cuda.log == ["synchronize", cuda.current]


def test_a_capture_is_on_a_stream_and_in_a_pool_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandInCuda(monkeypatch)
    recorder = CudaRecorder(GPU)
    collecting: list[bool] = []

    def body() -> None:
        cuda.log.append("body")
        collecting.append(gc.isenabled())
        # Nobody waits for the device meanwhile.
        assert capture_lock.is_held_here

    recorder.capture(body)
    begin = ("begin", (0, 1), "thread_local")
    assert cuda.log == [
        "side waits for", "enter stream", "cuBLAS handle", "clear workspaces", begin, "body", "end",
        "leave stream", "clear workspaces", "current waits for",
    ]  # fmt: skip
    assert collecting == [False]
    assert gc.isenabled()
    cuda.log.clear()
    recorder.capture(body)
    assert begin in cuda.log  # the same pool


def fail() -> None:
    raise RuntimeError("not permitted while capturing")


@pytest.mark.parametrize("captured_before", [False, True])
def test_a_capture_that_the_device_breaks_off_is_ended_everywhere(
    captured_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = StandInCuda(monkeypatch)
    recorder = CudaRecorder(GPU)
    if captured_before:
        recorder.capture(lambda: None)
    for body, words in ((fail, "not permitted"), (lambda: None, "previous error")):
        cuda.log.clear()
        cuda.invalid = True
        with pytest.raises(RuntimeError, match=words):
            recorder.capture(body)
        assert not cuda.recording
        pool = next(entry[1] for entry in cuda.log if entry[0] == "begin")
        told = [("end allocation", 1, pool), ("release", 1, pool)]
        # Random generators learn of the end by a capture of nothing.
        nothing = [("begin", "its own", "thread_local"), "end"]
        assert cuda.log[-6:] == [*told, *nothing, "clear workspaces", "leave stream"]
        assert gc.isenabled()
        cuda.invalid = False
        recorder.capture(lambda: None)
        assert ("begin", pool, "thread_local") not in cuda.log[-9:]  # another pool


def test_a_capture_whose_body_fails_is_ended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandInCuda(monkeypatch)
    recorder = CudaRecorder(GPU)
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.capture(fail)
    # PyTorch has told its allocator, and gives the pool back with the graph.
    assert cuda.log[-3:] == ["end", "clear workspaces", "leave stream"]
    assert not cuda.recording


def test_short_times_are_exact_however_long_the_process_has_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    StandInCuda(monkeypatch)
    times = [0, 300_000_000_000, 300_000_003_000]  # nanoseconds: at first, five minutes on, then
    waited: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = times.pop(0)

        def synchronize(self) -> None:
            waited.append(self.at)

        def elapsed_time(self, end: Event) -> float:
            return float(np.float32((end.at - self.at) / 1e6))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    device = CudaDevice(GPU, StandInDriver())
    device.clock()
    begin, end = device.clock(), device.clock()
    assert device.elapsed(begin, end) == 3000
    assert waited == [300_000_003_000]


def test_a_device_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    StandInCuda(monkeypatch, capability=(7, 5))
    with pytest.raises(DeviceError, match=r"Some GPU has compute capability 7\.5.*need 8\.0"):
        CudaDevice(GPU, StandInDriver())


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    StandInCuda(monkeypatch)
    require_cuda(torch.device("cuda"))
    require_cuda(torch.device("cuda:1"))
    with pytest.raises(DeviceError, match=r"there is no cuda:2: PyTorch sees 2 GPUs"):
        CudaDevice(torch.device("cuda:2"), StandInDriver())


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(DeviceError, match="built for ROCm"):
        require_cuda()
