"""Packed weights in files: mapped, shared, the same bits, and as changeable as they say."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import SaveError, WeightsReleasedError
from turbotx.runtime.packed_parameter import PackedParameter
from turbotx.runtime.packed_weight import PackedWeight
from turbotx.saved.container import BLOCK, PAGE, Stream, read_container, write_container

X = torch.randn(4, 8)


class Model(nn.Module):
    """A packed pair of products, a turned weight, a table tied to a product, one that is read."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
        self.head.weight = self.table.weight
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.turned = nn.Parameter(torch.randn(8, 8))
        self.to(dtype)

    def forward(self, x):
        x = x.to(self.turned.dtype) + self.table.weight[0]
        return self.head((self.a(x).tanh() * self.b(x).tanh()) @ self.turned)


def saved(path: Path, dtype: torch.dtype = torch.float32, **how) -> tuple[nn.Module, torch.Tensor]:
    model = Model(dtype).eval()
    fast = turbotx.optimize(model, keep_weights=how.pop("keep_weights", True))
    expected = fast(X)
    turbotx.save(fast, path, **how)
    return model, expected


def packed_names(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if isinstance(p, PackedParameter)}


@pytest.mark.parametrize("keep", [True, False])
def test_loading_packs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    file = tmp_path / "model.ttx"
    how = {"panels": ["native"]} if keep else {}
    model, expected = saved(file, keep_weights=keep, **how)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = turbotx.load(file)
    assert packed_names(loaded) == {"a.weight", "b.weight", "turned"}
    of, packed = PackedWeight.of, []
    monkeypatch.setattr(PackedWeight, "of", lambda *args: packed.append(args) or of(*args))
    assert torch.equal(loaded(X), expected)
    assert len(packed) == 1  # the head, whose weight the table is
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    with pytest.raises(WeightsReleasedError):
        loaded.a.weight.data.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sets", [["avx2"], ["avx512"], ["avx512_bf16"], ["avx2", "native"]])
def test_panels_of_any_processor_are_taken(
    tmp_path: Path, dtype: torch.dtype, sets: list[str]
) -> None:
    file = tmp_path / "model.ttx"
    model, expected = saved(file, dtype, panels=sets)
    with zipfile.ZipFile(file) as archive:
        assert {f"{name}.panels" for name in sets} <= {*archive.namelist()}
    loaded = turbotx.load(file)
    assert torch.equal(loaded(X), expected)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    if "native" in sets:
        assert packed_names(loaded) == {"a.weight", "b.weight", "turned"}


def test_a_file_without_panels_may_be_changed(tmp_path: Path) -> None:
    file = tmp_path / "model.ttx"
    model, _ = saved(file)
    before = file.read_bytes()
    loaded = turbotx.load(file)
    assert not packed_names(loaded)
    with torch.no_grad():
        for one in (model, loaded):
            one.a.weight.mul_(2)
            one.table.weight.add_(1)
    torch.testing.assert_close(loaded(X), model(X))
    assert file.read_bytes() == before  # what is written to is this process's own


def test_packed_parameters_are_written_as_they_were_without_panels(tmp_path: Path) -> None:
    file = tmp_path / "model.ttx"
    model, expected = saved(file, keep_weights=False, panels=[])
    assert packed_names(model)
    loaded = turbotx.load(file)
    assert not packed_names(loaded) and torch.equal(loaded(X), expected)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_weights_from_elsewhere_leave_panels_out(tmp_path: Path) -> None:
    file = tmp_path / "model.ttx"
    saved(file, panels=["native"])
    other = Model().eval()
    loaded = turbotx.load(file, weights=other)
    torch.testing.assert_close(loaded(X), other(X))
    assert not packed_names(loaded)


def test_unknown_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="no panels for 'avx9'"):
        saved(tmp_path / "model.ttx", panels=["avx9"])


def test_streams_begin_at_pages_and_are_checked_by_block(tmp_path: Path) -> None:
    data = torch.randint(0, 256, (2 * BLOCK + 5,), dtype=torch.uint8).numpy()
    pieces = [memoryview(data[a : a + 1_000_003]) for a in range(0, len(data), 1_000_003)]
    entries = {"a.json": b"{}", "b.panels": Stream(len(data), lambda: pieces), "c.panels": b"xyz"}
    write_container(tmp_path / "file", entries, {})
    _, found = read_container(tmp_path / "file")
    assert found["a.json"] == b"{}" and bytes(found["c.panels"]) == b"xyz"
    assert bytes(found["b.panels"]) == data.tobytes()
    mapped = torch.frombuffer(found["b.panels"], dtype=torch.uint8)
    assert mapped.data_ptr() % PAGE == 0
