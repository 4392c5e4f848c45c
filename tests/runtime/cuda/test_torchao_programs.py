"""Models that torchao has quantised as programs for a GPU, every kernel in Triton's interpreter.

In: layers whose weights are integers already. Out: products by the very integers and scales, each
launch by the rule; changes of them; what no GPU multiplies by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

import turbotx
from tests.engine.test_torchao import WIDE, Wide, X, made
from tests.runtime.cuda.stand_in_device import InterpretedDevice, RecordingDevice, bind_to
from tests.runtime.cuda.test_quantized_programs import kernels
from tests.saved.stand_in_cubins import Cubins
from tests.torchao_weights import INT4_WAYS, WAYS, quantize_int4
from turbotx.engine.pipeline import compile_captured
from turbotx.errors import OptionsError, SaveError
from turbotx.options import Options


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("float_rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_weights_are_multiplied_by_as_they_are(
    way: str, float_rows: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = made(way, float_rows, dtype), InterpretedDevice()
    for linear in (model.a, model.c):  # whose floats, quantised once more, are other integers
        linear.weight.qdata.div_(2, rounding_mode="floor")
    fast = bind_to(device, model, monkeypatch)
    ours = kernels(device, lambda: fast(X))
    assert sum("int8" in name for name in ours) == 2
    numerics = turbotx.explain(fast, X).numerics(fast, X)
    assert numerics.holds and numerics.likenesses[0].worst > 0.999
    tolerance = 8 * torch.finfo(dtype).eps if float_rows else 2e-2
    torch.testing.assert_close(fast(X), model(X), rtol=tolerance, atol=tolerance)
    model.a.weight.scale.mul_(2)
    torch.testing.assert_close(fast(X), model(X), rtol=tolerance, atol=tolerance)
    assert fast.stats()["captures"] == 1


@torch.no_grad()
@pytest.mark.parametrize("way", INT4_WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_numbers_are_multiplied_by_with_their_offsets(
    way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model: Any = quantize_int4(way, Wide().eval().to(dtype))
    device = InterpretedDevice()
    fast = bind_to(device, model, monkeypatch)
    assert sum("int4" in name for name in kernels(device, lambda: fast(WIDE))) == 2
    numerics = turbotx.explain(fast, WIDE).numerics(fast, WIDE)
    assert numerics.holds and numerics.likenesses[0].worst > 0.999
    eps = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(fast(WIDE), model(WIDE), rtol=eps, atol=eps)


@torch.no_grad()
def test_floats_of_quantised_weights_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("stand-in", float_rows=True)
    fast = bind_to(RecordingDevice(), model, monkeypatch)
    fast(X)
    memory = turbotx.explain(fast, X).to_dict()["memory"]
    matrices = sum(m.weight.numel() for m in (model.a, model.b, model.c))
    assert memory["derived_nbytes"] < 2 * matrices


@pytest.mark.parametrize(("name", "value"), [("backend", "aten"), ("gemms", "cublas")])
def test_a_librarys_products_are_refused(name: str, value: str) -> None:
    captured = turbotx.explain(made("stand-in", float_rows=False), X).compiled.captured
    with pytest.raises(OptionsError, match=f"quantised weights on sm_90 .*{name}={value!r}"):
        compile_captured(captured, Options(**{name: value}), "sm_90")


def test_groups_that_no_tile_holds_are_refused() -> None:
    model: Any = quantize_int4("Int4Tensor", Wide().eval(), group=24)
    model.a = model.b = torch.nn.Linear(64, 96)
    captured = turbotx.explain(model, WIDE).compiled.captured
    with pytest.raises(OptionsError, match=r"c.weight has a scale for every 24 .* on sm_90"):
        compile_captured(captured, Options(), "sm_90")


@torch.no_grad()
@pytest.mark.parametrize("weights", [True, False])
def test_a_file_for_gpus_is_refused(
    weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cubins(monkeypatch)
    fast = turbotx.optimize(made("stand-in", float_rows=True))
    fast(X)
    with pytest.raises(SaveError, match=r"c.weight is torchao's, .* not \['cpu', 'sm_90'\]"):
        turbotx.save(fast, tmp_path / "no.ttx", weights=weights, targets=["cpu", "sm_90"])
