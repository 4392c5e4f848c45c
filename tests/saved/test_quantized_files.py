"""Files of quantised models: int8 and scales in the place of floats, on any processor's panels."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.runtime.test_quantized_weights import ALL, Projections, X, packed_names
from turbotx.engine.optimize import engine_of
from turbotx.errors import InputError, QuantizedWarning
from turbotx.runtime.packed_weight import PackedWeight
from turbotx.saved.verify import verify_saved

pytestmark = needs_compiler


def saved(path: Path, dtype: torch.dtype = torch.float32, **how: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(2)
    options = {k: how.pop(k) for k in ("quantize", "keep_weights") if k in how}
    fast: Any = turbotx.optimize(Projections().eval().to(dtype), **{"quantize": "int8", **options})
    expected = fast(X)
    turbotx.save(fast, path, **how)
    return fast, expected


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("how", ["int8", "int8-weights", "int4-weights"])
def test_a_file_has_no_floats_and_packs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, how: str
) -> None:
    file = tmp_path / "model.ttx"
    fast, expected = saved(file, quantize=how, keep_weights=keep)
    first = fast(X[:1])
    with zipfile.ZipFile(file) as archive:
        floats = archive.read("weights.safetensors")
        assert not any(f'"{name}"'.encode() in floats for name in ALL)
        assert b"a.bias" in floats
    monkeypatch.setattr(PackedWeight, "of", lambda *args: pytest.fail("packed"))
    loaded = turbotx.load(file)
    assert packed_names(loaded) == ALL
    assert torch.equal(loaded(X), expected) and torch.equal(loaded(X[:1]), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sets", [["avx2"], ["avx512", "native"]])
def test_panels_of_any_processor_are_taken(
    tmp_path: Path, dtype: torch.dtype, sets: list[str]
) -> None:
    file = tmp_path / "model.ttx"
    fast, expected = saved(file, dtype, panels=sets)
    loaded = turbotx.load(file)
    assert torch.equal(loaded(X), expected) and packed_names(loaded) == ALL
    with torch.no_grad():
        loaded.a.bias.add_(1)
        fast.a.bias.add_(1)
    assert torch.equal(loaded(X), fast(X))


def test_floats_are_written_where_panels_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "model.ttx"
    fast, expected = saved(file, panels=[])
    loaded = turbotx.load(file)
    assert not packed_names(loaded) and torch.equal(loaded(X), expected)
    assert torch.equal(loaded.state_dict()["a.weight"], fast.a.weight)


def test_floats_that_were_given_up_are_written_with_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "model.ttx"
    with pytest.warns(QuantizedWarning, match="the file has integers times scales"):
        fast, expected = saved(file, keep_weights=False, panels=[])
    loaded = turbotx.load(file)
    torch.testing.assert_close(loaded(X), expected)
    with pytest.warns(QuantizedWarning):
        own = fast.state_dict()
    assert all(torch.equal(own[name], value) for name, value in loaded.state_dict().items())


def test_floats_from_elsewhere_are_quantised(tmp_path: Path) -> None:
    file = tmp_path / "model.ttx"
    saved(file)
    other = Projections().eval()
    loaded = turbotx.load(file, weights=other)
    assert torch.equal(loaded(X), turbotx.optimize(other, quantize="int8")(X))


def test_a_file_is_verified_against_its_own_model_only(tmp_path: Path) -> None:
    file = tmp_path / "model.ttx"
    fast, _ = saved(file)
    loaded = turbotx.load(file)
    _, found = verify_saved(loaded, engine_of(fast), (X,), {})
    assert found.likenesses[0].worst > 0.999
    with torch.no_grad():
        fast.b.weight.mul_(1.2)
    with pytest.raises(InputError, match="other values of"):
        verify_saved(loaded, engine_of(fast), (X,), {})


def test_a_product_that_stays_float_is_written_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    fast: Any = turbotx.optimize(model, quantize="int8")
    expected = fast(X)
    turbotx.save(fast, tmp_path / "model.ttx")
    loaded = turbotx.load(tmp_path / "model.ttx")
    assert torch.equal(loaded(X), expected)
    with pytest.warns(QuantizedWarning):
        assert torch.equal(loaded.state_dict()["2.weight"], model[2].weight)
