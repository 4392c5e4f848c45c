"""Calls of the CUDA driver, on a stand-in that checks and records what it is given.

In: a kernel compiled for sm_90 on this machine. Out: what is loaded, asked for and launched, and
the words of errors.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.compiled_functions import compile_function
from turbotx.errors import BuildError, DeviceError
from turbotx.kernels.job import read_entry
from turbotx.kernels.triton.compiler import Built, build, kernel_job
from turbotx.runtime.cuda import driver as cuda_driver

CONTEXT, MODULE, HANDLE = 77, 11, 22


class StandInDriver:
    """libcuda as ctypes shows it: integers, pointers to fill in, error codes."""

    def __init__(self, **fail: int) -> None:
        self.fail, self.calls = fail, []
        self.context = 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            if name in self.fail:
                return self.fail[name]
            fill = {
                "cuCtxGetCurrent": self.context, "cuDeviceGet": 3,
                "cuDevicePrimaryCtxRetain": CONTEXT, "cuModuleLoadData": MODULE,
                "cuModuleGetFunction": HANDLE,
            }  # fmt: skip
            if name in fill:
                arguments[0]._obj.value = fill[name]
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"invalid argument"
            if name == "cuCtxSetCurrent":
                self.context = arguments[0].value
            return 0

        return call

    def named(self, name: str) -> list[Any]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture(scope="module")
def built() -> Built:
    compiled = compile_function(lambda x: torch.softmax(x, -1), torch.randn(2, 40))
    (lowered,) = [k for fused in compiled.fused for k in fused.kernels]
    return build([kernel_job(lowered.kernel, "sm_90")], measure=False)[0]


def load(driver: Any, built: Built, shared_nbytes: int = 512) -> cuda_driver.LoadedKernel:
    binary = replace(built.binary(), shared_nbytes=shared_nbytes)
    return cuda_driver.load_function(driver, binary, 200_000)


def test_a_cubin_is_loaded_by_the_name_and_threads_in_its_ptx(built: Built) -> None:
    driver = StandInDriver()
    function = load(driver, built)
    assert driver.named("cuModuleLoadData")[0][1] == built.files["cubin"].read_bytes()
    assert driver.named("cuModuleGetFunction")[0][2] == built.job.name.encode()
    assert (function.handle, function.binary.threads) == (HANDLE, 32 * built.job.num_warps)
    assert built.job.taken <= function.binary.arguments <= built.job.taken + 2
    # Every kernel prefers shared memory, so that no processor is divided anew between two.
    assert [a[1:] for a in driver.named("cuFuncSetAttribute")] == [(9, 100)]


def test_much_shared_memory_is_asked_for_and_too_much_refused(built: Built) -> None:
    driver = StandInDriver()
    load(driver, built, 100_000)
    assert [a[1:] for a in driver.named("cuFuncSetAttribute")] == [(8, 100_000), (9, 100)]
    with pytest.raises(BuildError, match="needs 300000 bytes of shared memory and the device has"):
        load(driver, built, 300_000)


def test_a_kernel_that_wants_scratch_memory_is_refused(
    built: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert built.scratch_nbytes == 0
    folder = built.files["cubin"].parent
    shutil.copytree(folder, tmp_path / "triton" / folder.name)
    monkeypatch.setenv("TURBOTX_CACHE_DIR", str(tmp_path))
    result = tmp_path / "triton" / folder.name / "result.json"
    kept = json.loads(result.read_text())
    assert kept.pop("scratch_nbytes") == 0
    driver = StandInDriver()
    result.write_text(json.dumps({**kept, "scratch_nbytes": 256}))
    with pytest.raises(BuildError, match="needs 256 bytes of global scratch memory"):
        load(driver, build([built.job], measure=False)[0])
    assert not driver.calls
    result.write_text(json.dumps(kept))  # as results were kept before
    assert load(driver, build([built.job], measure=False)[0]).handle == HANDLE


def test_a_launch_is_one_call(built: Built) -> None:
    driver = StandInDriver()
    function = load(driver, built)
    addresses = (ctypes.c_void_p * 4)(1, 2, 3, 4)
    cuda_driver.launch(driver, function, (40, 2, 1), addresses, 99)
    (given,) = driver.named("cuLaunchKernel")
    assert given == (HANDLE, 40, 2, 1, function.binary.threads, 1, 1, 512, 99, addresses, None)


def test_a_dependent_launch_says_so_to_the_driver(built: Built) -> None:
    seen: list[Any] = []

    class Driver(StandInDriver):
        def cuLaunchKernelEx(self, config: Any, function: Any, addresses: Any, extra: Any) -> int:
            c = config._obj
            assert ctypes.sizeof(c) == 56 and ctypes.sizeof(cuda_driver.LaunchAttribute) == 72
            given = (tuple(c.grid), tuple(c.block), c.shared, c.stream, c.count)
            seen.append((given, c.attributes[0].id, c.attributes[0].value, function.value, extra))
            return 0

    function = load(driver := Driver(), built)
    addresses = (ctypes.c_void_p * 4)(1, 2, 3, 4)
    cuda_driver.launch_dependent(driver, function, (40, 2, 1), addresses, 99)
    block = (function.binary.threads, 1, 1)
    assert seen == [(((40, 2, 1), block, 512, 99, 1), 6, 1, HANDLE, None)]
    failing = StandInDriver(cuLaunchKernelEx=1)
    with pytest.raises(DeviceError, match=r"CUDA error 1 \(invalid argument\) in launching"):
        cuda_driver.launch_dependent(failing, load(failing, built), (1, 1, 1), None, 0)


def test_errors_are_in_the_drivers_words(built: Built) -> None:
    driver = StandInDriver(cuLaunchKernel=1)
    function = load(driver, built)
    with pytest.raises(DeviceError, match=r"CUDA error 1 \(invalid argument\) in launching .*soft"):
        cuda_driver.launch(driver, function, (1, 1, 1), None, 0)
    with pytest.raises(DeviceError, match="loading"):
        load(StandInDriver(cuModuleLoadData=209), built)


def test_a_new_thread_gets_the_devices_context_once() -> None:
    driver = StandInDriver()
    cuda_driver.ensure_context(driver, 3)
    cuda_driver.ensure_context(driver, 3)
    assert driver.named("cuDeviceGet")[0][1] == 3
    assert driver.context == CONTEXT
    assert len(driver.named("cuCtxSetCurrent")) == 1


def test_ptx_that_is_not_understood_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no entry"):
        read_entry(".visible .func f()")
    maximum = ".visible .entry k(\n .param .u64 a,\n .param .u32 b\n)\n.maxntid 256, 1, 1\n{"
    assert read_entry(maximum) == ("k", 256, 2)
