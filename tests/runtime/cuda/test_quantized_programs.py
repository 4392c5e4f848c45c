"""Int8 models as programs for a GPU, every kernel in Triton's interpreter.

In: a layer of every kind of product, a BERT, a Llama. Out: each launch against the exact product of
the same integers in float64, by the rule of every other test; beside the CPU's program; who
quantises which rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is for Linux only")

import turbotx
from tests.compiled_functions import compile_function
from tests.engine.test_quantized import made
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.kernels.triton.triton_runner import TritonRunner
from tests.models import token_inputs
from tests.runtime.cuda.stand_in_device import InterpretedDevice, RecordingDevice, bind_to
from tests.runtime.cuda.test_steps import make_small, new_cache, step
from tests.runtime.cuda.test_triton_programs import tiny
from tests.saved.stand_in_cubins import Cubins
from turbotx.engine.optimize import engine_of
from turbotx.errors import OptionsError, SaveError
from turbotx.ir.quantized_ops import LEVELS, quantize_rows, row_scale
from turbotx.report.report import explain_call

INT8 = {"quantize": "int8"}
SPLIT = {"gemm_*": "m16n16k32x2"}


def kernels(device: InterpretedDevice, run: Callable[[], Any]) -> list[str]:
    device.log.clear()
    run()
    assert not device.names("call"), "PyTorch runs nothing"
    return device.names("launch")


@pytest.mark.parametrize("how", ["int8", "fp8", "int8-weights", "int4-weights"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.float16, {"schedules": SPLIT}), (torch.bfloat16, {})],
)
def test_every_launch_keeps_the_rule(
    dtype: torch.dtype, how: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = made(dtype), torch.randn(2, 5, 24).to(dtype)
    given = {"quantize": how, "keep_float": (), **options}
    fast = bind_to(InterpretedDevice(), model, monkeypatch, **given)
    numerics = turbotx.explain(fast, x).numerics(fast, x)
    assert all(e.holds for e in numerics.launches), [e for e in numerics.launches if not e.holds]
    assert any(how.replace("-", "_") in e.name for e in numerics.launches) and not numerics.outputs
    assert numerics.likenesses[0].worst > 0.999


@needs_compiler
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_at_any_shape_beside_the_cpus_program(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = tiny(name), InterpretedDevice()
    given = [token_inputs(*shape) for shape in ((2, 3), (1, 1), (2, 3))]
    cpu = turbotx.optimize(model, **INT8)
    theirs = [cpu(**inputs)[0] for inputs in given]
    fast = bind_to(device, model, monkeypatch, **INT8)
    ours = [fast(**inputs)[0] for inputs in (*given, given[0])]  # plainly, captured, replayed
    assert "replay" in {entry[0] for entry in device.log}
    for mine, other in zip(ours, [*theirs, theirs[0]], strict=True):
        # The same integers but where a kernel's last bit rounds to another one.
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    changed = fast(**given[0])[0]
    assert not torch.allclose(changed, ours[0], atol=1e-2)
    fresh = bind_to(InterpretedDevice(), model, monkeypatch, **INT8)
    torch.testing.assert_close(changed, fresh(**given[0])[0], rtol=0, atol=0)


@pytest.fixture
def many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs as of many tokens: kernels quantise all rows."""
    name = "turbotx.kernels.schedule_selector.prefers_quantizing"
    monkeypatch.setattr(name, lambda *given: False)


def short(names: list[str]) -> list[str]:
    assert "int8" not in names[-1] and "fp8" not in names[-1], "the head stays float"
    return [re.sub("gemm_(int8|fp8)_float16_", "", n) for n in names[:-1]]


@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_who_quantises_few_tokens(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, device = made(torch.float16), InterpretedDevice()
    fast, x = bind_to(device, model, monkeypatch, quantize=how), torch.randn(2, 5, 24).half()
    assert short(kernels(device, lambda: fast(x))) == [
        "fused_layer_norm_row_scale_quantize_rows", "40x24_bias_gelu_peaks", "24x40_quantizes",
        "fused_add_layer_norm_row_scale_quantize_rows", "40x24_silu_gated_peaks",
        "24x40_quantizes", "fused_add_layer_norm",
    ]  # fmt: skip
    numerics = turbotx.explain(fast, x).numerics(fast, x)
    assert numerics.holds and numerics.likenesses[0].worst > 0.999


@pytest.mark.usefixtures("many_tokens")
def test_who_quantises_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, device = made(torch.float16), InterpretedDevice()
    fast, x = bind_to(device, model, monkeypatch, **INT8), torch.randn(2, 5, 24).half()
    assert short(kernels(device, lambda: fast(x))) == [
        "fused_layer_norm_row_scale_quantize_rows", "40x24_bias_gelu",
        "fused_row_scale_quantize_rows", "24x40",
        "fused_add_layer_norm_row_scale_quantize_rows", "40x24_silu_gated",
        "fused_row_scale_quantize_rows", "24x40", "fused_add_layer_norm",
    ]  # fmt: skip
    numerics = turbotx.explain(fast, x).numerics(fast, x)
    assert numerics.holds


def again(model: Any) -> nn.Module:
    made: nn.Module = type(model)(model.config).to(model.dtype).eval()
    return made


@pytest.mark.parametrize("padding", ["padded", "packed"])
def test_a_layer_has_as_many_launches_as_without(
    padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = token_inputs(2, 7)
    counts = []
    for options in (INT8, {"quantize": "fp8"}, {"norms": "store"}):
        found = []
        for layers in (1, 2):
            model = tiny("bert", torch.float16)
            model.config.num_hidden_layers = layers
            device, how = RecordingDevice(), {"padding": padding, **options}
            fast: Any = bind_to(device, again(model), monkeypatch, **how)
            device.log.clear()
            fast(**given)
            found.append(len(device.names("launch")))
        counts.append(found[1] - found[0])
    assert counts == [7, 7, 7]


@pytest.mark.parametrize("kind", LEVELS, ids=str)
def test_kernels_find_the_numbers_of_the_reference(kind: torch.dtype) -> None:
    x = torch.randn(9, 50) * torch.logspace(-40, 30, 9)[:, None]
    x[3, 7], x[5, 2], x[6] = torch.nan, torch.inf, 0.0
    x[0] = torch.linspace(-127, 127, 50)  # halves among them
    for given in (x, x.half(), x.bfloat16()):

        def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scale = row_scale(x, kind)
            return scale, quantize_rows(x, scale, kind)

        ours = compile_function(both, given).run((given,), TritonRunner())
        for mine, wanted in zip(ours, both(given), strict=True):
            mine, wanted = mine.float(), wanted.float()
            torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", ["cpu", "sm_80", "gfx942"])
def test_fp8_is_refused_where_nothing_multiplies_it(target: str) -> None:
    fast = turbotx.optimize(made(), quantize="fp8")
    with pytest.raises(OptionsError, match=f"{target} does not: take quantize='int8'"):
        explain_call(engine_of(fast), (torch.randn(2, 5, 24),), {}, target)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"gemms": "cublas"}, "gemms='cublas' forbids that"),
        ({"backend": "aten"}, "backend='aten' forbids that"),
        ({"norms": "fold"}, "norms='fold' forbids that"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: dict[str, str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = bind_to(InterpretedDevice(), made(), monkeypatch, **INT8, **options)
    with pytest.raises(OptionsError, match=why):
        fast(torch.randn(2, 5, 24))


def test_weights_alone_take_the_launches_of_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel quantises, and each product is one launch."""
    found = []
    for options in ({"norms": "store"}, {"quantize": "int8-weights"}, {"quantize": "int4-weights"}):
        model, device = made(torch.float16), RecordingDevice()
        fast: Any = bind_to(device, model, monkeypatch, **options)
        device.log.clear()
        fast(torch.randn(2, 5, 24).half())
        found.append(device.names("launch"))
    floats, *quantised = found
    for names in quantised:
        assert [re.sub("_int[48]_weights", "", n) for n in names] == floats
        assert sum("weights" in n for n in names) == 4, "the head stays float"


def test_one_capture_serves_cpus_and_gpus() -> None:
    model: nn.Module = made()
    fast, x = turbotx.optimize(model, **INT8), torch.randn(2, 5, 24)
    report = turbotx.explain(fast, x)
    text = str(report.graph.graph)
    gpu = explain_call(engine_of(fast), (x,), {}, "sm_90")
    assert "row_scale" in str(gpu.graph.graph)
    again = engine_of(fast).compile(report.compiled.captured, "sm_90")
    assert sum("int8" in x.name for x in again.assembly.launches) == 4
    assert str(report.graph.graph) == text


@needs_compiler
def test_a_file_for_cpus_and_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, path, x = made(torch.float16), tmp_path / "int8.ttx", torch.randn(2, 5, 24).half()
    fast = turbotx.optimize(model, **INT8)
    ours = fast(x)[0]
    turbotx.save(fast, path, targets=["cpu", "sm_90"])
    with pytest.raises(SaveError, match="panels are for models that run on CPUs"):
        turbotx.save(fast, tmp_path / "no.ttx", targets=["cpu", "sm_90"], panels=["native"])
    assert torch.equal(turbotx.load(path)(x)[0], ours)
    loaded = Cubins(monkeypatch).load(path, "sm_90")
    for _ in range(3):  # plainly, captured, replayed
        torch.testing.assert_close(loaded(x)[0], ours, rtol=0, atol=2e-2)
    assert loaded.stats()["kernel_builds"] == 0


@pytest.mark.parametrize("how", ["int8", "int8-weights", "int4-weights"])
def test_a_decoder_with_a_cache(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_small("gpt2")
    fast = bind_to(InterpretedDevice(), model, monkeypatch, quantize=how, keep_float=())
    cache, rows = new_cache(model), []
    for k in range(4):
        rows.append(step(fast, cache, *((3, 9, 4) if k == 0 else (5 + k,)))[:, -1])
    with torch.no_grad():
        whole = fast(input_ids=torch.tensor([[3, 9, 4, 6, 7, 8]]), use_cache=False)
    steps = torch.stack(rows, 1)
    torch.testing.assert_close(steps, whole.logits[:, 2:], rtol=0, atol=2e-3)
    assert fast.stats()["graph_captures"] == 1, "of all steps"
