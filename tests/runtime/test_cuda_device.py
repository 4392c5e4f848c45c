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

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.compiled_functions import compile_function
from tests.runtime.test_cuda_driver import StandInDriver
from turbotx.errors import DeviceError
from turbotx.kernels.job import Binary
from turbotx.kernels.targets import kernel_job
from turbotx.runtime.cuda_device import CudaDevice, CudaRecorder, require_cuda

GPU = torch.device("cuda", 1)


class StandInCuda:
    """What is used of torch.cuda, writing down what it is asked."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)
    ) -> None:
        self.log: list[Any] = []
        self.current = SimpleNamespace(cuda_stream=7, wait_stream=self.note("current waits for"))
        self.fail_at_end = False
        facts = {
            "is_available": lambda: True,
            "get_device_capability": lambda index: capability,
            "get_device_name": lambda index: "Some GPU",
            "get_device_properties": lambda index: SimpleNamespace(
                shared_memory_per_block_optin=232448
            ),
            "init": lambda: None,
            "current_stream": lambda device: self.current,
            "device": self.entered("device"),
            "stream": self.entered("stream"),
            "Stream": lambda device: SimpleNamespace(wait_stream=self.note("side waits for")),
            "CUDAGraph": lambda: SimpleNamespace(
                capture_begin=self.note("begin"), capture_end=self.end, replay=self.note("replay")
            ),
            "graph_pool_handle": lambda: (0, len(self.log)),
        }
        for name, value in facts.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "hip", None)
        clear = self.note("clear workspaces")
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)

    def note(self, name: str) -> Any:
        return lambda *args, **options: self.log.append((name, options) if options else name)

    def end(self) -> None:
        self.log.append("end")
        if self.fail_at_end:
            raise RuntimeError("the capture was invalidated")

    def entered(self, name: str) -> Any:
        @contextmanager
        def enter(what: Any) -> Any:
            self.log.append(f"enter {name}")
            yield
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


def test_a_capture_is_on_a_stream_and_in_a_pool_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandInCuda(monkeypatch)
    recorder = CudaRecorder(GPU)
    collecting: list[bool] = []

    def body() -> None:
        cuda.log.append("body")
        collecting.append(gc.isenabled())

    recorder.capture(body)
    begin = ("begin", {"pool": (0, 2), "capture_error_mode": "thread_local"})
    assert cuda.log == [
        "side waits for", "clear workspaces", "enter stream", begin, "body", "end", "leave stream",
        "clear workspaces", "current waits for",
    ]  # fmt: skip
    assert collecting == [False]
    assert gc.isenabled()
    cuda.log.clear()
    recorder.capture(body)
    assert begin in cuda.log  # the same pool


def test_a_capture_that_fails_is_ended_and_its_pool_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = StandInCuda(monkeypatch)
    recorder = CudaRecorder(GPU)
    cuda.fail_at_end = True

    def body() -> None:
        raise RuntimeError("not permitted while capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.capture(body)
    assert cuda.log[-2:] == ["end", "clear workspaces"]
    assert gc.isenabled()
    assert recorder._pool is None


def test_a_device_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    StandInCuda(monkeypatch, capability=(7, 5))
    with pytest.raises(DeviceError, match=r"Some GPU has compute capability 7\.5.*need 8\.0"):
        CudaDevice(GPU, StandInDriver())


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(DeviceError, match="built for ROCm"):
        require_cuda()
