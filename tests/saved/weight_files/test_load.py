"""load_weights: every format gives the same parameters, and what does not fit is listed by name."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import turbotx
from tests.models import small_model, token_inputs
from turbotx.errors import WeightsError
from turbotx.saved.weight_files import load_weights

safetensors = pytest.importorskip("safetensors.torch")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.dense = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("places", torch.arange(4), persistent=False)


State = dict[str, torch.Tensor]


def write_safetensors(state: State, path: Path) -> None:
    safetensors.save_file({k: v.contiguous().clone() for k, v in state.items()}, path)


def write_npz(state: State, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{k: v.numpy() for k, v in state.items()})


def write_torch(state: State, path: Path) -> None:
    torch.save(state, path)


def write_checkpoint(state: State, path: Path) -> None:
    torch.save({"state_dict": state, "epoch": 3}, path)


def write_old(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def assert_same_state(model: nn.Module, expected: State) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, write",
    [
        ("w.safetensors", write_safetensors),
        ("w.weights", write_safetensors),
        ("w.npz", write_npz),
        ("w.zip", write_npz),
        ("w.pt", write_torch),
        ("w.ckpt", write_checkpoint),
        ("w.bin", write_old),
    ],
)
def test_every_format_fills_the_models_own_tensors(
    name: str, write: Callable[[State, Path], None], tmp_path: Path
) -> None:
    source, model = Tied(), Tied()
    before = dict(model.named_parameters())
    write(source.state_dict(), tmp_path / name)
    load_weights(model, tmp_path / name)
    assert_same_state(model, source.state_dict())
    assert all(p is before[n] for n, p in model.named_parameters())
    assert model.head.weight is model.words.weight


def test_an_optimized_module_sees_them_at_the_next_call(tmp_path: Path) -> None:
    model = small_model("bert", layers=1)
    fast, inputs = turbotx.optimize(model), token_inputs(2, 7)
    fast(**inputs)
    state = model.state_dict().items()
    other = {k: v + 0.1 * torch.randn_like(v) for k, v in state if v.is_floating_point()}
    write_safetensors(other, tmp_path / "w.safetensors")
    turbotx.load_weights(fast, str(tmp_path / "w.safetensors"))
    assert_same_state(model, other)
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert fast.stats()["captures"] == 1


def pack_as_turbotransformers(state: State) -> State:
    """By its description: Q, K, V side by side as columns, dense weights as (in, out)."""
    packed: State = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.*\.)self\.(query|key|value)\.(weight|bias)", name)
        if found is None:
            packed[name] = tensor.t() if name.endswith("dense.weight") else tensor
        elif found[2] == "query":
            parts = [state[f"{found[1]}self.{p}.{found[3]}"] for p in ("query", "key", "value")]
            packed[f"{found[1]}qkv.{found[3]}"] = torch.cat([p.t() for p in parts], -1)
    return packed


def test_turbotransformers_layout(tmp_path: Path) -> None:
    source, model = small_model("bert", layers=1), small_model("bert", layers=1)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p))
    packed = pack_as_turbotransformers(source.state_dict())
    assert packed["encoder.layer.0.attention.qkv.weight"].shape == (64, 192)
    assert packed["encoder.layer.0.attention.qkv.bias"].shape == (192,)
    write_npz(packed, tmp_path / "bert.npz")
    load_weights(model, tmp_path / "bert.npz")
    assert_same_state(model, source.state_dict())

    del packed["encoder.layer.0.attention.qkv.bias"]
    write_npz(packed, tmp_path / "less.npz")
    with pytest.raises(WeightsError, match=r"3 missing.*layer\.0\.attention\.self\.query\.bias"):
        load_weights(model, tmp_path / "less.npz")


def test_everything_that_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    wrong = Tied().state_dict()
    del wrong["dense.bias"], wrong["head.weight"]
    wrong["dense.weight"] = torch.randn(4, 3)
    wrong["steps"] = torch.tensor(1.5)
    wrong["more"] = torch.zeros(1)
    torch.save(wrong, tmp_path / "w.pt")
    with pytest.raises(WeightsError) as found:
        load_weights(model, tmp_path / "w.pt")
    said = str(found.value)
    assert "1 missing from the file: dense.bias" in said
    assert "1 in the file, not in the model: more" in said
    assert "dense.weight has shape (4, 3), the model's (4, 4)" in said
    assert "steps is float32, the model's int64" in said
    assert_same_state(model, before)


def test_tied_weights_need_one_name_and_must_agree(tmp_path: Path) -> None:
    state = Tied().state_dict()
    for name in ("head.weight", "words.weight"):
        model = Tied()
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path / "w.pt")
        load_weights(model, tmp_path / "w.pt")
        assert_same_state(model, state)
    torch.save({**state, "head.weight": torch.zeros(5, 4)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="one tensor in the model, two in the file"):
        load_weights(model, tmp_path / "w.pt")


def test_buffers_outside_the_state_are_taken_and_never_missed(tmp_path: Path) -> None:
    model = Tied()
    torch.save({**model.state_dict(), "places": torch.arange(4) + 7}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert model.places.tolist() == [7, 8, 9, 10]


def test_values_are_widened_and_never_rounded(tmp_path: Path) -> None:
    source, model = Tied().bfloat16(), Tied()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert model.dense.weight.dtype is torch.float32
    assert torch.equal(model.dense.weight, source.dense.weight.float())
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"dense\.weight is float32, the model's bfloat16"):
        load_weights(source, tmp_path / "w.pt")


def test_a_sharded_checkpoint_is_read_by_its_index(tmp_path: Path) -> None:
    source, model = Tied(), Tied()
    state = source.state_dict()
    shards = {
        "a.safetensors": ["words.weight", "steps"],
        "b.safetensors": ["dense.weight", "dense.bias", "head.weight"],
    }
    for file, names in shards.items():
        write_safetensors({n: state[n] for n in names}, tmp_path / file)
    index = {"weight_map": {n: file for file, names in shards.items() for n in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_weights(model, tmp_path)
    assert_same_state(model, state)

    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"needs b\.safetensors"):
        load_weights(model, tmp_path)
    index["weight_map"]["steps"] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="not a file beside it"):
        load_weights(model, tmp_path)


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a file was run')",)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"dense.weight": Attack()}, tmp_path / "w.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"dense.weight": Attack()}))
    np.savez(tmp_path / "w.npz", **{"dense.weight": np.array([Attack()], dtype=object)})
    for name in ("w.pt", "plain.bin", "w.npz"):
        with pytest.raises(WeightsError):
            load_weights(Tied(), tmp_path / name)


def test_files_that_are_not_weights_say_so(tmp_path: Path) -> None:
    write_safetensors(Tied().state_dict(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-8])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    (tmp_path / "folder").mkdir()
    for name, said in {
        "w.safetensors": "not a complete safetensors file",
        "text.pt": r"text\.pt",
        "empty.npz": r"cannot read .*empty\.npz",
        "list.pt": "holds a list",
        "epoch.pt": r"not tensors: epoch \(int\)",
        "none.pt": "there is no file",
        "folder": "holds none of",
    }.items():
        with pytest.raises(WeightsError, match=said):
            load_weights(Tied(), tmp_path / name)


def test_a_prefix_is_pointed_out(tmp_path: Path) -> None:
    torch.save({f"bert.{k}": v for k, v in Tied().state_dict().items()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"names begin with 'bert\.'"):
        load_weights(Tied(), tmp_path / "w.pt")


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "w.pt")
    with torch.device("meta"):
        model = Tied()
    with pytest.raises(WeightsError, match="device meta"):
        load_weights(model, tmp_path / "w.pt")
