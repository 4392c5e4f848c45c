"""One compile for every target: what it says a GPU launches is what a device is given to launch.

In: a tiny model of GEMMs, norms and attention. Out: jobs, names; one capture for every target.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.models import token_inputs
from tests.runtime.cuda.stand_in_device import RecordingDevice, bind_to
from tests.runtime.cuda.test_triton_programs import tiny
from turbotx import ir
from turbotx.capture.trace import Captured, capture
from turbotx.engine.optimize import engine_of
from turbotx.engine.pipeline import compile_captured, jobs, schedule
from turbotx.errors import InputError
from turbotx.options import Options
from turbotx.runtime.cpu.runtime import CpuCode

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(tiny("bert", torch.float16), (), token_inputs(2, 3))


def test_jobs_are_what_a_device_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbotx.kernels.gemm_heuristics.MOST_FOLDED", 16)
    device = RecordingDevice()
    fast = bind_to(device, tiny("bert", torch.float16), monkeypatch, cuda_graphs=False)
    seen = set()
    for batch, seq in ((2, 3), (3, 7), (8, 30)):
        device.log.clear()
        fast(**token_inputs(batch, seq))
        (compiled,) = engine_of(fast).variants()
        found = jobs(compiled.unbound, (batch, seq, batch))
        assert [x.job.name for x in found] == device.names("launch")
        assert {x.job.digest() for x in found} <= set(device.loaded)
        gemms = [x.job.name for x in found if isinstance(x.launch, ir.GemmLaunch)]
        seen.add(any("_layer_norm" in name for name in gemms))
    assert seen == {True, False}, "norms are folded where tokens are few, and stored elsewhere"


def test_one_capture_serves_every_target(captured: Captured) -> None:
    options, dims = Options(), captured.example_dims
    cpu = compile_captured(captured, Options(backend="aten"))
    assert isinstance(cpu.at(dims).code, CpuCode) and jobs(cpu, dims) == []
    gpus = {t: compile_captured(captured, options, t) for t in ("sm_80", "sm_90", "gfx942")}
    for target, program in gpus.items():
        assert program.call.text == cpu.call.text and "linear" in program.call.text
        assert {x.job.target for x in jobs(program, dims)} == {target}
    # Launches know their family of targets only: another GPU's kernels need no second assembly.
    again = schedule(gpus["sm_90"].call, options, "sm_80")
    assert [x.job for x in jobs(again, dims)] == [x.job for x in jobs(gpus["sm_80"], dims)]


def test_the_librarys_gemms_leave_the_kernels_behind_them(captured: Captured) -> None:
    call = compile_captured(captured, Options(), "sm_90").call
    found = jobs(schedule(call, Options(gemms="cublas"), "sm_90"), captured.example_dims)
    assert found and not any(x.job.name.startswith("gemm_") for x in found)
    assert any("gelu" in x.job.name for x in found), "what an epilogue would have done"


@pytest.mark.parametrize(("made_for", "target"), [("sm_90", "cpu"), ("cpu", "sm_90")])
def test_launches_of_cpus_are_not_scheduled_for_gpus(
    captured: Captured, made_for: str, target: str
) -> None:
    call = compile_captured(captured, Options(backend="aten"), made_for).call
    with pytest.raises(InputError, match=f"'{target}' is none: compile the call for it"):
        schedule(call, Options(), target)


def test_a_graph_rewritten_for_one_kind_of_attention_is_not_taken_for_another(
    captured: Captured,
) -> None:
    compile_captured(captured, Options(), "sm_90")
    with pytest.raises(InputError, match=r"attention='auto'.* capture the call again for 'flash'"):
        compile_captured(captured, Options(attention="flash"))
